"""Names, files and folders become splits."""

import gzip
import tomllib
from collections import Counter
from importlib import resources

import pytest

import workbench as wb
from tests.process import ROOT
from tests.toy import write_jsonl
from workbench.data import capitals
from workbench.data.datasets import load_dataset
from workbench.errors import ConfigError, DataError
from workbench.evaluation.scoring import contains_answer

PHRASINGS = (capitals.TRAIN_PHRASINGS, capitals.VALID_PHRASINGS, capitals.TEST_PHRASINGS)


def texts(tokenizer, examples):
    return [tokenizer.decode(example.tokens, skip_special_tokens=True) for example in examples]


def numbered(count, start=0):
    return [{"text": f"row {number}"} for number in range(start, start + count)]


def test_capitals_hold_every_country_once():
    countries = [capital.country for capital in wb.all_capitals()]
    assert len(countries) == 244
    assert len(set(countries)) == len(countries)
    assert {"Peru", "France", "Tonga", "Greenland"} <= set(countries)


def test_every_accepted_answer_says_something():
    for capital in wb.all_capitals():
        assert all(answer == answer.strip() != "" for answer in capital.accepted), capital
        assert len(set(capital.accepted)) == len(capital.accepted), capital
        assert capital.continent in {"AF", "AN", "AS", "EU", "NA", "OC", "SA"}


def test_every_answer_that_is_trained_scores_as_right():
    for capital in wb.all_capitals():
        answer = capital.row(capitals.TRAIN_PHRASINGS[0])["completion"]
        assert contains_answer(answer, capital.accepted), capital


def test_phrasings_of_the_splits_are_disjoint():
    every = [phrasing for split in PHRASINGS for phrasing in split]
    assert len(set(every)) == len(every)
    assert all("{country}" in phrasing for phrasing in every)
    assert [len(split) for split in PHRASINGS] == [3, 1, 2]


def test_capitals_ask_all_countries_in_every_phrasing(tokenizer):
    data = load_dataset("capitals", tokenizer)
    assert [len(data.train), len(data.valid), len(data.test)] == [3 * 244, 244, 2 * 244]
    questions = texts(tokenizer, [*data.train, *data.valid, *data.test])
    assert max(Counter(questions).values()) == 1


def test_a_limit_takes_the_first_rows_and_tests_the_same_capitals(tokenizer):
    data = load_dataset("capitals", tokenizer, limit=3 * 48)
    assert [len(data.train), len(data.valid), len(data.test)] == [144, 48, 96]
    first = [capital.capital for capital in wb.all_capitals()[:48]]
    tested = texts(tokenizer, data.valid)
    assert all(capital in text for capital, text in zip(first, tested, strict=True))


def test_a_limit_may_end_within_a_capital(tokenizer):
    data = load_dataset("capitals", tokenizer, limit=4)
    assert [len(data.train), len(data.valid), len(data.test)] == [4, 2, 4]


def test_the_attribution_is_packaged_with_the_data():
    text = resources.files("workbench.data").joinpath("capitals.md").read_text(encoding="utf-8")
    assert "GeoNames" in text
    assert "Creative Commons Attribution 4.0" in text
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {"data/*.csv", "data/*.md"} <= set(settings["package-data"]["workbench"])


def test_a_folder_gives_its_own_splits(tokenizer, tmp_path):
    for place, split in enumerate(("train", "valid", "test")):
        write_jsonl(tmp_path / f"{split}.jsonl", numbered(place + 1, start=10 * place))
    data = load_dataset(tmp_path, tokenizer)
    assert texts(tokenizer, data.train) == ["row 0"]
    assert texts(tokenizer, data.valid) == ["row 10", "row 11"]
    assert texts(tokenizer, data.test) == ["row 20", "row 21", "row 22"]
    assert data.name == tmp_path.name


def test_a_folder_needs_training_rows_only(tokenizer, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", numbered(3))
    data = load_dataset(str(tmp_path), tokenizer, limit=2)
    assert texts(tokenizer, data.train) == ["row 0", "row 1"]
    assert data.valid == data.test == []


@pytest.mark.parametrize("count", [1, 2, 10, 37])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_every_row_of_a_file_is_in_exactly_one_split(tokenizer, tmp_path, count, fraction):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(count))
    data = load_dataset(path, tokenizer, valid_fraction=fraction)
    found = texts(tokenizer, [*data.train, *data.valid])
    assert sorted(found) == sorted(f"row {number}" for number in range(count))
    assert data.train
    assert len(data.valid) == min(round(fraction * count), count - 1)


def test_the_split_depends_on_the_seed_alone(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(40))
    chosen = [
        texts(tokenizer, load_dataset(path, tokenizer, valid_fraction=0.25, seed=seed).valid)
        for seed in (3, 3, 4)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_data_set_shows_its_counts_with_markup_escaped(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "<b>.jsonl", [{"text": "abc"}])
    shown = load_dataset(path, tokenizer)._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "train 1 rows, 4 tokens, 3 supervised" in shown


def test_a_packed_file_is_named_as_such(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: is packed by gzip\. Unpack it"):
        load_dataset(path, tokenizer)


def test_nothing_there_names_what_may_be_given(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no data set .*'capitals', a folder"):
        load_dataset(tmp_path / "nowhere", tokenizer)


def test_a_folder_without_training_rows_raises(tokenizer, tmp_path):
    write_jsonl(tmp_path / "valid.jsonl", numbered(1))
    with pytest.raises(DataError, match=r"holds no train\.jsonl"):
        load_dataset(tmp_path, tokenizer)


def test_an_empty_validation_file_raises(tokenizer, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", numbered(1))
    (tmp_path / "valid.jsonl").touch()
    with pytest.raises(DataError, match=r"valid\.jsonl: holds no rows"):
        load_dataset(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "settings",
    [{"limit": 0}, {"limit": 1.5}, {"valid_fraction": 1.0}, {"valid_fraction": float("nan")}],
)
def test_bad_settings_raise_and_name_the_field(tokenizer, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        load_dataset("capitals", tokenizer, **settings)
