"""Whole words and phrases are found, and nothing else; word files are checked."""

import json
import re

import pytest

from tests.provenance_lists import LISTS, write_lists
from workbench.data import provenance_words
from workbench.data.provenance_words import (
    KEYS,
    MAX_CHARACTERS,
    MAX_FILE_BYTES,
    entropy_of_counts,
    read_words,
)
from workbench.errors import ConfigError, FileFormatError


@pytest.fixture
def words(tmp_path):
    return read_words(write_lists(tmp_path / "words.json"))


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("the whole of it", 0),
        ("whom, whoever, somewho", 0),
        ("who says so", 0.35),
        ("The WHO's report", 0.35),
        ("(who)", 0.35),
        ("ask _who_", 0.35),
        ("who1", 0),
        ("whó", 0),
        ("who\u0301", 0),
        ("Town  Council", 0.1),
        ("town\ncouncil", 0.1),
        ("town-council", 0.1),
        ("the town. Council of", 0),
        ("town, council", 0),
        ("town councillor", 0),
        ("downtown council", 0),
        ("the U.S. Department of State", 0.3),
        ("the US Department", 0),
        ("town council, who", 0.35),
        ("", 0),
    ],
)
def test_institutions_are_found_by_whole_words_in_any_case(words, text, mark):
    assert words.find(text).institution == mark


def test_of_many_institutions_the_largest_mark_counts(tmp_path):
    offices = {f"office{place}": 0.01 * place for place in range(1, 20)}
    words = read_words(write_lists(tmp_path / "words.json", institutions=offices))
    for last in range(1, len(offices) + 1):
        named = list(offices)[:last]
        assert words.find(" ".join(named)).institution == offices[named[-1]]


def test_phrases_count_once_and_source_types_as_often_as_they_stand(words):
    found = words.find("Diary, diary, DIARY: I saw it. Letter letter letters map. A text book.")
    assert (found.primary, found.consensus, found.variety) == (2, 0, 0)
    assert found.source_types == (1, 1, 3)  # book, map, letter
    found = words.find("Settled, however it is known; others deny, others deny.")
    assert (found.primary, found.consensus, found.variety) == (0, 2, 2)
    assert found.source_types == ()


def test_letters_match_in_every_spelling_of_their_accents(tmp_path):
    path = write_lists(tmp_path / "words.json", institutions={"Académie": 0.2, "STRASSENAMT": 0.3})
    words = read_words(path)
    assert words.find("l'acade\u0301mie").institution == 0.2
    assert words.find("L’ACADÉMIE").institution == 0.2
    assert words.find("das Straßenamt").institution == 0.3
    assert words.find("academie").institution == 0


def test_the_lists_agree_with_regular_expressions(words):
    text = (
        "Who saw the diary? I saw the maps, a map; experts agreed. Experts agree: disputed, "
        "undisputed, other's deny, others deny. The who-is-who of the text-books, one text-book."
    )

    def count(phrase):
        spaced = r"[\s-]+".join(map(re.escape, re.split(r"[\s-]", phrase)))
        return len(re.findall(rf"(?<!\w){spaced}(?!\w)", text, re.IGNORECASE))

    found = words.find(text)
    for name in ("primary_sources", "consensus", "variety"):
        expected = sum(bool(count(phrase)) for phrase in LISTS[name])
        assert getattr(found, name.removesuffix("_sources")) == expected
    types = [sum(map(count, phrases)) for phrases in LISTS["source_types"].values()]
    assert found.source_types == tuple(sorted(filter(None, types)))
    marks = [mark for phrase, mark in LISTS["institutions"].items() if count(phrase)]
    assert found.institution == max(marks)


@pytest.mark.parametrize("tail", ["le", "\u0301", "2", "ß"])
def test_a_word_that_the_end_of_reading_cuts_does_not_count(words, tail):
    start = " " * (MAX_CHARACTERS - 3) + "who"
    assert words.find(start).institution == 0.35
    assert words.find(f"{start} and more").institution == 0.35
    assert words.find(start + tail).institution == 0
    assert words.find(f" {start}").institution == 0
    assert words.find(f"{start[:-3]}    who is it").institution == 0


def test_the_packages_own_lists_are_read_once():
    words = read_words()
    assert read_words(None) is read_words(words) is words
    assert words.find("According to experts of the university, I measured it").institution == 0.2
    assert words.find("The whole society").institution == 0.1


@pytest.mark.parametrize(
    ("counts", "bits"),
    [((), 0), ((7,), 0), ((1, 1), 1), ((1, 1, 1, 1), 2), ((1, 2), 0.9182958340544896)],
)
def test_entropy_is_shannons_in_bits(counts, bits):
    assert entropy_of_counts(counts) == pytest.approx(bits, abs=1e-15)


MANY = [f"word {number}" for number in range(provenance_words.MAX_PHRASES + 1)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variety": None}, "has no key 'variety'.*A word file has institutions"),
        ({"words": []}, "has the unknown key 'words'"),
        ({"institutions": ["who"]}, "institutions: must be an object, got list"),
        ({"consensus": "settled"}, "consensus: must be a list of phrases, got str"),
        ({"consensus": None, "Consensus": []}, "'Consensus'|'consensus'"),
        ({"source_types": {"map": "map"}}, "source_types, 'map': must be a list"),
        ({"variety": [3]}, "variety: a phrase must be a text, got int"),
        ({"variety": [None]}, "variety: a phrase must be a text, got NoneType"),
        ({"variety": [""]}, "variety: the phrase '' must begin with a word"),
        ({"variety": ["...so"]}, r"variety: the phrase '\.\.\.so' must begin with a word"),
        ({"variety": ["a" * 101]}, "at most 100 characters"),
        ({"variety": ["Well-known", "well known"]}, "'well known' and 'Well-known', which are"),
        ({"source_types": {"a": ["map"], "b": ["MAP"]}}, "'MAP' and 'map', which are the same"),
        ({"institutions": {"who": 0.36}}, "the mark of 'who' must be a number from 0 to 0.35"),
        ({"institutions": {"who": -0.1}}, "the mark of 'who'"),
        ({"institutions": {"who": False}}, "the mark of 'who'"),
        ({"institutions": {"who": "0.3"}}, "the mark of 'who'"),
        ({"institutions": {"who": float("nan")}}, "the mark of 'who'"),
        ({"variety": MANY}, "has more than 5000 phrases"),
    ],
)
def test_a_malformed_list_is_named_by_file_and_key(tmp_path, changes, says):
    path = write_lists(tmp_path / "words.json", **changes)
    with pytest.raises(FileFormatError, match=says) as caught:
        read_words(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b'{"institutions": {}', "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"variety": [], "variety": []}', "the key 'variety' twice"),
        (b'{"variety": ["caf\xe9"]}', "is not valid JSON"),
        (b" " * (MAX_FILE_BYTES + 1), "is larger than 1000000 bytes"),
    ],
)
def test_what_is_no_word_file_is_refused(tmp_path, content, says):
    path = tmp_path / "words.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=says):
        read_words(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="No such file"):
        read_words(tmp_path / "nowhere.json")
    with pytest.raises(FileFormatError, match="not a regular file"):
        read_words(tmp_path)
    with pytest.raises(ConfigError, match="words must be a file's path, got dict"):
        read_words(dict(LISTS))


def test_a_list_may_be_empty(tmp_path):
    path = tmp_path / "words.json"
    empty = {key: {} if key in ("institutions", "source_types") else [] for key in KEYS}
    path.write_text(json.dumps(empty))
    assert read_words(path).find("I saw the university").institution == 0
