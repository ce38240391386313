"""Frames, lists and Hugging Face data sets give the rows that a file would give."""

import itertools

import numpy as np
import pandas as pd
import pytest

from tests.toy import conversation, write_jsonl
from workbench.data.datasets import load_dataset
from workbench.data.row_sources import read_source
from workbench.errors import ConfigError, DataError

ROWS = [{"text": f"row {number}"} for number in range(37)]
CHATS = [conversation(f"question {n}", f"answer {n}") for n in range(5)]


def same(one, other):
    """Whether two data sets hold the same tokens and targets in every split."""
    pairs = itertools.zip_longest(
        *([*d.train, None, *d.valid, None, *d.test] for d in (one, other))
    )
    return all(
        a is b is None
        or (np.array_equal(a.tokens, b.tokens) and np.array_equal(a.loss_mask, b.loss_mask))
        for a, b in pairs
    )


@pytest.fixture(scope="module")
def hub():
    """The `datasets` package, if some other package brought it."""
    return pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed here")


@pytest.mark.parametrize("form", [list, tuple, pd.DataFrame])
def test_rows_in_memory_are_split_as_those_of_a_file(form, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    settings = {"limit": 20, "valid_fraction": 0.25, "seed": 3}
    expected = load_dataset(path, tokenizer, **settings)
    assert same(load_dataset(form(ROWS), tokenizer, **settings), expected)
    assert len(expected.train) == 20


def test_a_mapping_gives_its_own_splits(tokenizer):
    source = {"validation": ROWS[:2], "train": pd.DataFrame(ROWS[2:5]), "test": tuple(ROWS[5:6])}
    data = load_dataset(source, tokenizer)
    assert [[e.where for e in part] for part in (data.train, data.valid, data.test)] == [
        ["train row 0", "train row 1", "train row 2"],
        ["validation row 0", "validation row 1"],
        ["test row 0"],
    ]


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "Val"])
def test_a_folder_and_a_mapping_name_their_validation_alike(name, tokenizer, tmp_path):
    parts = {"train": ROWS[:3], name: ROWS[3:5], "test": ROWS[5:6]}
    for split, rows in parts.items():
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    data = load_dataset(tmp_path, tokenizer)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [3, 2, 1]
    assert data.valid[0].where.endswith(f"{name}.jsonl:1")
    if name.islower():
        assert same(load_dataset(parts, tokenizer), data)


def test_two_files_of_one_split_are_refused(tokenizer, tmp_path):
    for split in ("train", "valid", "val"):
        write_jsonl(tmp_path / f"{split}.jsonl", ROWS[:2])
    with pytest.raises(DataError, match=r"holds val\.jsonl and valid\.jsonl, both of them valid"):
        load_dataset(tmp_path, tokenizer)


def test_cells_without_a_value_are_absent():
    frame = pd.DataFrame(
        {
            "text": ["a", None, "c", np.nan],
            "weight": [np.nan, 2.0, 3.0, 4.0],
            "when": [pd.NaT] * 4,
            "what": [pd.NA, None, "x", pd.NA],
        }
    )
    rows = [row for _, row in read_source(frame, valid_fraction=0).splits["train"]]
    assert rows == [
        {"text": "a"},
        {"weight": 2.0},
        {"text": "c", "weight": 3.0, "what": "x"},
        {"weight": 4.0},
    ]


def test_messages_as_parquet_gives_them_are_a_chat(tokenizer):
    # Arrays of structs, each with every key that any message has.
    cells = [
        np.array([{**message, "name": None} for message in chat["messages"]], dtype=object)
        for chat in CHATS
    ]
    frame = pd.DataFrame({"messages": cells, "text": [None] * len(cells)})
    found = read_source(frame, valid_fraction=0).splits["train"]
    assert [row for _, row in found] == CHATS
    assert same(load_dataset(frame, tokenizer), load_dataset(CHATS, tokenizer))


def test_a_row_is_named_by_the_number_that_finds_it(tokenizer):
    rows = [dict(row) for row in ROWS]
    rows[17] = {"text": 3}
    for source in (rows, pd.DataFrame(rows, index=range(100, 137))):
        with pytest.raises(DataError, match=r"^row 17: 'text' must be a string, got int"):
            load_dataset(source, tokenizer)
    with pytest.raises(DataError, match=r"^train row 17: "):
        load_dataset({"train": rows}, tokenizer)


def test_the_description_says_where_rows_came_from(tokenizer):
    assert str(load_dataset(pd.DataFrame(ROWS), tokenizer)).startswith("pandas DataFrame: train 33")
    assert load_dataset(ROWS, tokenizer).name == "list"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "list: holds no rows"),
        (pd.DataFrame(), "pandas DataFrame: holds no rows"),
        ({"train": ROWS, "valid": []}, "list valid: holds no rows"),
        ({"valid": ROWS}, "dict: has no split 'train'"),
        ({"train_prefs": ROWS}, r"has the split 'train_prefs'.*data\['train_prefs'\]"),
        ({"valid": ROWS, "validation": ROWS}, "has the split 'validation', too"),
        ({3: ROWS}, "has the split 3"),
        (["text"], "row 0: must be a mapping, got str"),
        ([ROWS[0], None], "row 1: must be a mapping, got NoneType"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "two columns"),
        (np.zeros(3), "rows cannot be read from a ndarray.*a data frame"),
        (3, "rows cannot be read from a int"),
        (None, "rows cannot be read from a NoneType"),
        (iter(ROWS), "rows cannot be read from a list_iterator"),
    ],
)
def test_what_holds_no_rows_is_named(source, says, tokenizer):
    with pytest.raises(DataError, match=says):
        load_dataset(source, tokenizer)


def test_a_row_that_contains_itself_raises(tokenizer):
    row = {"text": "a"}
    row["meta"] = [row]
    with pytest.raises(DataError, match=r"^row 0: cannot be read \(maximum recursion"):
        load_dataset([row], tokenizer)


def test_a_hugging_face_data_set_is_read_like_a_file(hub, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    settings = {"limit": 20, "valid_fraction": 0.25, "seed": 3}
    expected = load_dataset(path, tokenizer, **settings)
    data = load_dataset(hub.Dataset.from_list(ROWS), tokenizer, **settings)
    assert same(data, expected)
    assert data.name == "datasets Dataset"


def test_hugging_face_splits_and_missing_cells(hub, tokenizer):
    chat = {"messages": [*CHATS[0]["messages"], {"role": "user", "content": "b", "name": "Ann"}]}
    whole = hub.DatasetDict(
        {"train": hub.Dataset.from_list([chat, *CHATS[1:]]), "test": hub.Dataset.from_list(CHATS)}
    )
    found = read_source(whole)
    assert [row for _, row in found.splits["train"]] == [chat, *CHATS[1:]]
    assert found.name == "datasets DatasetDict"
    assert same(
        load_dataset(whole, tokenizer),
        load_dataset({"train": [chat, *CHATS[1:]], "test": CHATS}, tokenizer),
    )


def test_of_a_stream_no_more_is_read_than_the_limit_asks_for(hub, tokenizer):
    seen = []

    def rows():
        for number in itertools.count():
            seen.append(number)
            yield {"text": f"row {number}"}

    stream = hub.IterableDataset.from_generator(rows)
    data = load_dataset(stream, tokenizer, limit=9)
    assert (len(data.train), len(data.valid)) == (9, 1)
    assert len(seen) <= 11
    with pytest.raises(ConfigError, match=r"stream of rows needs a limit.*limit=1000"):
        load_dataset(stream, tokenizer)
    both = hub.IterableDatasetDict({"train": stream, "validation": stream})
    data = load_dataset(both, tokenizer, limit=4)
    assert (len(data.train), len(data.valid)) == (4, 4)


def test_what_a_stream_raises_names_the_row(hub, tokenizer):
    def rows():
        yield ROWS[0]
        raise OSError("the line is down")

    with pytest.raises(DataError, match=r"^row 1: cannot be read \(.*"):
        load_dataset(hub.IterableDataset.from_generator(rows), tokenizer, limit=9)
