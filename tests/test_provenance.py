"""Scores are those of the formulas, counted by hand; rows carry them into batches."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from tests.provenance_lists import FILLER, LISTS, write_lists
from tests.toy import conversation
from workbench.data.provenance import (
    ProvenanceScore,
    add_provenance,
    score_document,
    score_documents,
)
from workbench.data.provenance_words import MAX_CHARACTERS
from workbench.errors import DataError

KEYS = ("authority_weight", "provenance_entropy")


@pytest.fixture
def words(tmp_path):
    return write_lists(tmp_path / "words.json")


def scored(words, text="", **metadata):
    return score_document({"text": FILLER + text, **metadata}, words=words)


def test_a_whole_document_is_scored_as_by_hand(words):
    text = "I saw his diary and a letter, another letter and a map. Experts agree; others deny."
    score = scored(words, text, year=1950, citations=99, institution="WHO, Geneva")
    bits = -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    assert dataclasses.asdict(score) == pytest.approx(
        {
            "authority_base": 0.3,
            "authority_citations": 0.1,
            "authority_institution": 0.35,
            "authority_consensus": 0.1,
            "authority_age": -0.15,
            "authority_primary": -0.3,
            "authority_clamp": 0,
            "entropy_base": 5.5,
            "entropy_sources": bits,
            "entropy_primary": 1.0,
            "entropy_variety": 0.3,
            "entropy_institution": -0.525,
            "entropy_consensus": -0.4,
            "entropy_clamp": 0,
            "authority_weight": 0.4,
            "provenance_entropy": 5.875 + bits,
            "characters": len(FILLER + text),
            "characters_read": len(FILLER + text),
        },
        abs=1e-12,
    )


def test_a_text_that_says_nothing_has_the_bases(words):
    score = scored(words)
    assert (score.authority_weight, score.provenance_entropy) == (0.3, 1.5)


@pytest.mark.parametrize(
    ("year", "authority", "entropy"),
    [
        (None, 0, 1.5),
        (-44, -0.15, 5.5),
        (1969, -0.15, 5.5),
        (1970, 0, 3.5),
        (1994, 0, 3.5),
        (1995, 0.15, 1.5),
        (2024.0, 0.15, 1.5),
    ],
)
def test_age_has_three_steps(words, year, authority, entropy):
    score = scored(words, year=year)
    assert (score.authority_age, score.entropy_base) == (authority, entropy)


@pytest.mark.parametrize(
    ("citations", "term"),
    [(None, 0), (0, 0), (9, 0.05), (999, 0.15), (99_999, 0.25), (100_000, 0.25), (10**12, 0.25)],
)
def test_citations_count_by_their_logarithm_up_to_a_quarter(words, citations, term):
    assert scored(words, citations=citations).authority_citations == pytest.approx(term)


@pytest.mark.parametrize(
    ("name", "most", "terms"),
    [
        ("consensus", 3, {"authority_consensus": (0.1, 0.2), "entropy_consensus": (-0.4, -1)}),
        ("primary_sources", 5, {"authority_primary": (-0.15, -0.45), "entropy_primary": (0.5, 2)}),
        ("variety", 6, {"entropy_variety": (0.3, 1.5)}),
    ],
)
def test_counted_phrases_add_up_to_a_bound(words, name, most, terms):
    for count in range(most + 1):
        score = scored(words, ", ".join(LISTS[name][:count]))
        for term, (each, bound) in terms.items():
            expected = min(count * each, bound, key=abs)
            assert getattr(score, term) == pytest.approx(expected), (term, count)
    assert abs(bound) < abs(each) * most  # the bound was reached


def test_the_largest_mark_counts_wherever_it_is_named(words):
    assert scored(words, "the town council").authority_institution == 0.1
    assert scored(words, "the town council and who").authority_institution == 0.35
    score = scored(words, "the town council", institution="U.S. Department of Maps")
    assert (score.authority_institution, score.entropy_institution) == pytest.approx((0.3, -0.45))
    assert scored(words, institution="The whole of it").authority_institution == 0


def test_source_types_of_the_metadata_come_before_those_of_the_text(words):
    assert scored(words, "letter map").entropy_sources == 1
    given = ["Letter", "letter ", "chart", "chart", "film", "tape"]
    assert scored(words, "letter map", source_types=given).entropy_sources == pytest.approx(
        2 * (1 / 3) * math.log2(3) + 2 * (1 / 6) * math.log2(6)
    )
    assert scored(words, "letter map", source_types=[]).entropy_sources == 0


def test_clamps_are_terms_of_their_own(words):
    low = scored(words, "I saw the diary, field notes, ledger", year=1900)
    assert (low.authority_weight, low.authority_clamp) == pytest.approx((0, 0.3))
    text = "who: it is known, settled, experts agree"
    high = scored(words, text, year=2020, citations=10**9)
    assert (high.authority_weight, high.authority_clamp) == pytest.approx((0.99, -0.26))
    assert high.authority_weight <= 0.99
    assert (high.provenance_entropy, high.entropy_clamp) == pytest.approx((0, 0.025))


@pytest.mark.parametrize("characters", [0, 1, 49])
def test_a_short_text_is_not_judged(words, characters):
    text = "who experts agree diary letter map however ".ljust(49, ".")[:characters]
    score = score_document({"text": text, "year": 1900, "citations": 10**6}, words=words)
    assert (score.authority_weight, score.provenance_entropy) == (0.5, 3.0)
    assert (score.authority_base, score.entropy_base) == (0.5, 3.0)
    assert score.authority_institution == score.entropy_variety == score.authority_clamp == 0
    assert score_document({"text": text.ljust(50, ".")}, words=words).authority_base == 0.3


def test_of_a_huge_text_the_beginning_is_read(words):
    text = "filler " * MAX_CHARACTERS + " who"
    score = score_document(text, words=words)
    assert (score.characters, score.characters_read) == (len(text), MAX_CHARACTERS)
    assert score.authority_institution == 0
    assert f"the first {MAX_CHARACTERS} of {len(text)} characters were read" in str(score)


def random_rows(count, seed=0):
    """Rows whose texts hold random phrases, with random metadata, some of it absent."""
    random = np.random.default_rng(seed)
    phrases = [p for key in ("consensus", "primary_sources", "variety") for p in LISTS[key]]
    phrases += [*LISTS["institutions"], "letter", "letters", "map", "text book", "whole", "saw"]
    rows = []
    for _ in range(count):
        chosen = random.choice(phrases, random.integers(0, 12))
        row = {"text": ("" if random.random() < 0.1 else FILLER) + ", ".join(chosen)}
        if random.random() < 0.7:
            row["year"] = int(random.integers(1900, 2026))
        if random.random() < 0.7:
            row["citations"] = int(10 ** random.uniform(0, 7))
        if random.random() < 0.3:
            row["institution"] = str(random.choice(["who", "nobody", "the town council"]))
        if random.random() < 0.3:
            row["source_types"] = random.choice(["a", "b", "c"], 5).tolist()
        rows.append(row)
    return rows


def test_a_frame_is_scored_as_its_rows(words):
    rows = random_rows(200)
    frame = pd.DataFrame(rows, index=range(1000, 1200))
    assert frame["year"].dtype == np.float64  # a column with gaps
    table = score_documents(frame, words=words)
    assert list(table.columns) == [field.name for field in dataclasses.fields(ProvenanceScore)]
    assert table.index.equals(frame.index)
    expected = [dataclasses.asdict(score_document(row, words=words)) for row in rows]
    assert table.to_dict("records") == expected
    assert wb.score_documents(rows, words=words).to_dict("records") == expected


def test_terms_sum_to_the_totals_which_stay_in_range(words):
    table = score_documents(random_rows(500, seed=1), words=words)
    for group, total in zip(("authority_", "entropy_"), KEYS):
        terms = [name for name in table if name.startswith(group) and name != total]
        assert len(terms) == 7
        assert np.allclose(table[terms].sum(axis=1), table[total], rtol=0, atol=1e-14)
    assert table["authority_weight"].between(0, 0.99).all()
    assert (table["provenance_entropy"] >= 0).all()
    assert (table["authority_clamp"] != 0).any()


@pytest.mark.parametrize("seed", [2, 3])
def test_totals_are_the_formulas_worked_out_one_by_one(words, seed):
    for row in random_rows(100, seed):
        score, text = score_document(row, words=words), row["text"].lower()
        if len(text) < 50:
            assert (score.authority_weight, score.provenance_entropy) == (0.5, 3.0)
            continue
        parts = text.replace(FILLER.lower(), "").split(", ")
        primary, consensus, variety = (
            len({phrase for phrase in LISTS[name] if phrase.lower() in parts})
            for name in ("primary_sources", "consensus", "variety")
        )
        named = [*parts, row.get("institution", "").removeprefix("the ")]
        mark = max([0, *(m for name, m in LISTS["institutions"].items() if name.lower() in named)])
        types = [{"letters": "letter"}.get(p, p) for p in parts]
        types = [p for p in types if p in ("letter", "map", "text book")]
        types = row.get("source_types", types)
        shares = [types.count(name) / len(types) for name in set(types)]
        year = row.get("year")
        step = 0 if year is None else 1 if year < 1970 else 2 if year < 1995 else 3
        w = 0.3 + min(0.25, 0.05 * math.log10(row.get("citations", 0) + 1)) + mark
        w += min(0.2, 0.1 * consensus) + (0, -0.15, 0, 0.15)[step] - min(0.45, 0.15 * primary)
        h = (1.5, 5.5, 3.5, 1.5)[step] - sum(p * math.log2(p) for p in shares)
        h += min(2, 0.5 * primary) + min(1.5, 0.3 * variety) - 1.5 * mark - min(1, 0.4 * consensus)
        assert score.authority_weight == pytest.approx(min(max(w, 0), 0.99), abs=1e-12)
        assert score.provenance_entropy == pytest.approx(max(h, 0), abs=1e-12)


def test_all_that_a_row_says_is_read(words):
    chat = conversation(FILLER, "who?", "however", "I saw it")
    score = score_document(chat, words=words)
    assert (score.authority_institution, score.entropy_variety, score.entropy_primary) == (
        0.35,
        0.3,
        0.5,
    )
    pair = score_document({"prompt": FILLER + "who", "completion": "disputed"}, words=words)
    assert (pair.authority_institution, pair.entropy_variety) == (0.35, 0.3)


def test_a_score_says_its_terms():
    assert str(score_document("short")) == "authority 0.5 = +0.5 base; entropy 3 = +3 base"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"year": "1968"}, "'year' must be a whole number from -10000 to 10000, got str.*Leave"),
        ({"year": 1968.5}, "'year' must be a whole number .* got 1968.5"),
        ({"year": True}, "'year' must be a whole number .* got bool"),
        ({"year": 20_000}, "'year' .* got 20000"),
        ({"citations": -1}, "'citations' must be a whole number from 0 to 1000000000000, got -1"),
        ({"citations": math.inf}, "'citations' .* got inf"),
        ({"citations": 10**400}, "'citations' .* got int"),
        ({"institution": 7}, "'institution' must be a string, got int"),
        ({"source_types": "letter"}, "'source_types' must be a list"),
        ({"source_types": ["letter", 3]}, "'source_types' must be a list"),
        ({"source_types": [" "]}, "'source_types' must be a list"),
        ({"source_types": ["a"] * 1001}, "at most 1000 names"),
        ({"text": 3}, "'text' must be a string, got int"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"text": None}, "has no text to be scored.*'authority_weight'"),
        ({"prompt": "a"}, "'completion' must be a string"),
        ({"messages": []}, "list with at least one"),
    ],
)
def test_bad_metadata_is_named_by_row_and_key(row, says):
    rows = [{"text": FILLER}, {"text": FILLER, **row}]
    with pytest.raises(DataError, match=f"^row 1: .*{says}"):
        add_provenance(rows)
