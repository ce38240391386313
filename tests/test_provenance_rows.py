"""Rows carry authority and entropy, or get them, into examples and batches."""

import math
import tomllib

import numpy as np
import pandas as pd
import pytest

from tests.process import ROOT
from tests.provenance_lists import FILLER, write_lists
from tests.toy import conversation, write_jsonl
from tests.toy_preferences import toy_pairs
from workbench.data.batches import collate
from workbench.data.datasets import load_dataset
from workbench.data.examples import encode_row
from workbench.data.provenance import add_provenance, score_document
from workbench.data.provenance_words import read_words
from workbench.errors import ConfigError, DataError, FileFormatError

KEYS = ("authority_weight", "provenance_entropy")
HEAVY = {"text": FILLER, "authority_weight": 0.9, "provenance_entropy": 0.0}
LIGHT = {"text": FILLER + "more", "authority_weight": 0, "provenance_entropy": 7.5}
HALF = {"text": FILLER, "authority_weight": 0.9}
BARE = {"text": FILLER + "I saw the university", "year": 1900}


@pytest.mark.parametrize(
    "form", [{"text": FILLER}, {"prompt": "a", "completion": "b"}, conversation("a", "b")]
)
def test_an_example_carries_what_its_row_says(tokenizer, form):
    own = {"authority_weight": 0, "provenance_entropy": 2.5}
    example = encode_row({**form, **own}, tokenizer)
    assert (example.authority_weight, example.provenance_entropy) == (0.0, 2.5)
    assert isinstance(example.authority_weight, float)
    plain = encode_row({**form, "authority_weight": None}, tokenizer)
    assert plain.authority_weight is plain.provenance_entropy is None
    assert np.array_equal(plain.tokens, example.tokens)
    assert np.array_equal(plain.loss_mask, example.loss_mask)


def test_a_batch_has_a_column_where_every_row_has_a_value(tokenizer):
    examples = [encode_row(row, tokenizer) for row in (HEAVY, LIGHT, HALF)]
    both = collate(examples, [1, 0])
    assert both.authority_weight.tolist() == [0.0, 0.9]
    assert both.provenance_entropy.tolist() == [7.5, 0.0]
    assert both.authority_weight.dtype == both.provenance_entropy.dtype == np.float64
    for rows, weights in (([2, 1], [0.9, 0.0]), ([1, 2], [0.0, 0.9])):
        some = collate(examples, rows)
        assert some.authority_weight.tolist() == weights
        assert some.provenance_entropy is None


def test_pairs_carry_none():
    batch = collate(toy_pairs([(3, 5), (9, 2)]), [0, 1])
    assert batch.authority_weight is batch.provenance_entropy is None


BAD = [
    ({"authority_weight": 1.0}, "'authority_weight' must be a number from 0 to 0.99, got 1.0"),
    ({"authority_weight": 2}, "'authority_weight' must be a number from 0 to 0.99, got 2"),
    ({"authority_weight": -0.1}, "'authority_weight' .* got -0.1"),
    ({"authority_weight": True}, "'authority_weight' .* got bool"),
    ({"authority_weight": "0.5"}, "'authority_weight' .* got str"),
    ({"authority_weight": [0.5]}, "'authority_weight' .* got list"),
    ({"provenance_entropy": -1e-9}, "'provenance_entropy' must be a finite number from 0, got -1"),
    ({"provenance_entropy": math.inf}, "'provenance_entropy' .* got inf"),
    ({"provenance_entropy": 10**400}, "'provenance_entropy' .* got int"),
    ({"provenance_entropy": False}, "'provenance_entropy' .* got bool"),
]


@pytest.mark.parametrize(("own", "says"), BAD)
def test_a_value_out_of_range_is_named_by_row_and_key(tokenizer, own, says):
    rows = [BARE, {**HEAVY, **own}]
    with pytest.raises(DataError, match=f"^row 1: {says}"):
        add_provenance(rows)
    with pytest.raises(DataError, match=f"^row 1: {says}"):
        load_dataset(rows, tokenizer, valid_fraction=0)


def test_nan_is_absent_in_a_frame_and_refused_in_a_row(tokenizer):
    with pytest.raises(DataError, match=r"'authority_weight' .* got nan"):
        encode_row({**HEAVY, "authority_weight": math.nan}, tokenizer)
    frame = pd.DataFrame([HEAVY, BARE])
    assert load_dataset(frame, tokenizer, valid_fraction=0).train[1].authority_weight is None


def test_rows_get_what_they_lack_and_keep_what_they_have():
    rows = [HEAVY, BARE, HALF, LIGHT]
    score = score_document(BARE)
    found = add_provenance(rows)
    assert [[row[key] for key in KEYS] for row in found] == [
        [0.9, 0.0],
        [score.authority_weight, score.provenance_entropy],
        [0.9, 1.5],
        [0.0, 7.5],
    ]
    assert found[1] == BARE | dict(zip(KEYS, (score.authority_weight, score.provenance_entropy)))
    assert "authority_weight" not in BARE  # the rows given are as they were
    assert add_provenance([BARE | dict.fromkeys(KEYS)]) == found[1:2]
    assert add_provenance(found) == found


def test_a_frame_comes_back_as_a_frame():
    rows = [HEAVY, BARE, HALF]
    frame = pd.DataFrame(rows, index=list("abc"))
    before = frame.copy()
    found = add_provenance(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert list(found.index) == list("abc")
    assert list(found.columns) == ["text", *KEYS, "year"]
    expected = add_provenance(rows)
    assert found[list(KEYS)].to_dict("records") == [{k: row[k] for k in KEYS} for row in expected]


def test_the_largest_authority_may_come_as_float32(tokenizer):
    """The score's own clamp gives 0.99, and a file may hold its columns in float32."""
    weights = np.array([0.99, 0.5], dtype=np.float32)
    rows = pd.DataFrame({"text": ["a", "b"], "authority_weight": weights})
    assert add_provenance(rows).authority_weight.tolist() == [0.99, 0.5]
    row = {"text": "a", "authority_weight": float(np.float32(0.99))}
    assert encode_row(row, tokenizer).authority_weight == 0.99
    rows.loc[0, "authority_weight"] = np.nextafter(np.float32(0.99), np.float32(1))
    with pytest.raises(DataError, match=r"row 0: 'authority_weight' must be a number from 0 to"):
        add_provenance(rows)


def test_what_is_missing_may_be_refused(tokenizer):
    assert add_provenance([HEAVY, LIGHT], missing="refuse") == [HEAVY, LIGHT]
    says = r"^row 1: has no 'provenance_entropy' \(2 of 3 rows lack.*'score'"
    for load in (
        lambda: add_provenance([HEAVY, HALF, BARE], missing="refuse"),
        lambda: load_dataset([HEAVY, HALF, BARE], tokenizer, provenance="refuse"),
    ):
        with pytest.raises(DataError, match=says):
            load()


def test_another_word_file_may_be_given(tokenizer, tmp_path):
    path = write_lists(tmp_path / "words.json", institutions={"university": 0.35})
    (own,), (other,) = add_provenance([BARE]), add_provenance([BARE], words=path)
    assert other["authority_weight"] == pytest.approx(own["authority_weight"] + 0.15)
    for words in (path, str(path), read_words(path)):
        scored = {"provenance": "score", "words": words, "valid_fraction": 0}
        loaded = load_dataset({"train": [BARE], "test": [BARE]}, tokenizer, **scored)
        for example in (*loaded.train, *loaded.test):
            assert {key: getattr(example, key) for key in KEYS} == {key: other[key] for key in KEYS}
    for provenance in (None, "refuse"):
        with pytest.raises(ConfigError, match="words are for scoring, and provenance is"):
            load_dataset([HEAVY], tokenizer, provenance=provenance, words=path)
    path.write_text("{}")
    with pytest.raises(FileFormatError, match=r"words\.json: has no key"):
        add_provenance([BARE], words=str(path))
    with pytest.raises(FileFormatError, match=r"words\.json: has no key"):
        load_dataset([BARE], tokenizer, provenance="score", words=path)


def test_any_source_is_scored_on_loading(tokenizer, tmp_path):
    rows = [BARE, HEAVY, {**LIGHT, "citations": 99}]
    expected = [[row[key] for key in KEYS] for row in add_provenance(rows)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for source in (rows, pd.DataFrame(rows), path):
        train = load_dataset(source, tokenizer, valid_fraction=0, provenance="score").train
        assert [[e.authority_weight, e.provenance_entropy] for e in train] == expected
    folder = write_jsonl(tmp_path / "folder" / "train.jsonl", rows[:1]).parent
    write_jsonl(folder / "valid.jsonl", rows[:1])
    data = load_dataset(folder, tokenizer, provenance="score")
    assert [e.authority_weight for e in (*data.train, *data.valid)] == [expected[0][0]] * 2
    assert load_dataset(rows, tokenizer, valid_fraction=0).train[0].authority_weight is None


def test_a_bad_line_of_a_file_is_named(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [BARE, {**BARE, "year": "old"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'year' must be a whole number"):
        load_dataset(path, tokenizer, provenance="score")


def test_what_is_no_choice_or_no_rows_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"provenance 'guess' is unknown.*'score', 'refuse'"):
        add_provenance([BARE], missing="guess")
    with pytest.raises(ConfigError, match="provenance True is unknown"):
        load_dataset([BARE], tokenizer, provenance=True)
    with pytest.raises(DataError, match=r"takes rows in memory, got str.*provenance='score'"):
        add_provenance("rows.jsonl")
    with pytest.raises(DataError, match="takes rows in memory, got dict"):
        add_provenance({"train": [BARE]})
    with pytest.raises(DataError, match="holds no rows"):
        add_provenance([])


def test_the_word_file_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "data/*.json" in settings["package-data"]["workbench"]
