"""A text of one's own: read as untrusted, and cut into rows that lose nothing."""

import os

import numpy as np
import pytest

from workbench.data.text_tokenizers import byte_tokenizer
from workbench.data.texts import (
    MAX_TEXT_BYTES,
    Corpus,
    cut_rows,
    encode_text,
    first_token,
    read_corpus,
    text_dataset,
)
from workbench.errors import ConfigError, DataError

LINE = "Der Bär ißt 🍎.\n"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_last_lines_of_a_file_are_held_out(tmp_path):
    path = write(tmp_path / "bears.txt", LINE * 200)
    corpus = read_corpus(path)
    assert corpus.train + corpus.held_out == LINE * 200
    assert corpus.held_out.startswith("Der")
    assert len(corpus.held_out) == pytest.approx(0.1 * 200 * len(LINE), abs=len(LINE))
    assert str(corpus) == "bears.txt: train 3,600 bytes, held out 400 bytes".replace(
        "3,600", f"{len(corpus.train.encode()):,}"
    ).replace("400", f"{len(corpus.held_out.encode()):,}")
    assert len(read_corpus(path, held_out_fraction=0.5).held_out) > 4 * len(corpus.held_out)


@pytest.mark.parametrize("content", ["x" * 1_000, "x" * 999 + "\n", "\n" + "x" * 999])
def test_a_text_without_lines_is_cut_all_the_same(tmp_path, content):
    corpus = read_corpus(write(tmp_path / "x", content), held_out_fraction=0.001)
    assert corpus.train + corpus.held_out == content
    assert corpus.train
    assert corpus.held_out


def test_a_byte_order_mark_is_no_text(tmp_path):
    content = b"\xef\xbb\xbf" + LINE.encode() * 100
    assert read_corpus(write(tmp_path / "bom.txt", content)).train.startswith("Der")


BAD = {
    "empty": (b"", "is empty"),
    "tiny": (b"x" * 999, "has 999 bytes.*1,000 bytes or more"),
    "latin-1": (b"x" * 1_200 + "B\u00e4r".encode("latin-1"), r"is not UTF-8 \(byte 1201 of"),
    "cut": (LINE.encode() * 100 + "ä".encode()[:1], "is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_text_is_refused(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(DataError, match=message):
        read_corpus(write(tmp_path / "bad.txt", content))


def test_what_is_no_file_is_refused_without_being_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    for path, message in (
        (tmp_path / "none.txt", "cannot be read"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (huge, "is larger than 64,000,000 bytes"),
    ):
        with pytest.raises(DataError, match=message):
            read_corpus(path)
    for share in (0, 1, float("nan"), "half"):
        with pytest.raises(ConfigError, match="held_out_fraction"):
            read_corpus(huge, held_out_fraction=share)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 18, 40])
@pytest.mark.parametrize("window", [2, 8])
def test_rows_hold_every_token_once_as_a_target_and_fit(length, window):
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    rows = cut_rows(tokens, window, "text")
    targets = np.concatenate([row.tokens[1:] for row in rows])
    assert targets.tolist() == tokens[1:].tolist()
    assert all(row.loss_mask.all() and row.num_targets == window for row in rows[:-1])
    assert 1 <= rows[-1].num_targets <= window
    for row in rows:
        assert row.tokens.tolist() == list(range(row.tokens[0], row.tokens[0] + len(row)))
        assert row.where == f"text, tokens {row.tokens[0] - 100}–{row.tokens[-1] - 100}"


def test_both_parts_of_a_corpus_become_rows_of_one_data_set():
    tokenizer = byte_tokenizer()
    corpus = Corpus("ours", LINE * 20, "<|begin|>" + LINE)
    data = text_dataset(corpus, tokenizer, 16)
    for rows, text in ((data.train, corpus.train), (data.valid, corpus.held_out)):
        ids = [rows[0].tokens[0], *np.concatenate([row.tokens[1:] for row in rows])]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert data.valid[0].tokens[:2].tolist() == [tokenizer.bos_token_id] * 2  # one that is spelled
    assert not data.test
    for window in (1, 2.0):
        with pytest.raises(ConfigError, match="window"):
            text_dataset(corpus, tokenizer, window)


@pytest.mark.parametrize("text", ["", None, 7, b"bytes", "\ud800"])
def test_a_corpus_of_what_is_no_text_is_refused(text):
    with pytest.raises(DataError, match="ours, train: must be a text"):
        Corpus("ours", text, LINE)
    with pytest.raises(DataError, match="ours, held out: must be a text"):
        Corpus("ours", LINE, text)


@pytest.mark.parametrize("text", ["", None, 7, "\ud800"])
def test_what_is_no_text_has_no_tokens(text):
    with pytest.raises(DataError, match="must be a text"):
        encode_text(text, byte_tokenizer())


def test_a_tokenizer_that_drops_letters_or_knows_no_beginning_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert first_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.unk_token = "<|user|>"
    with pytest.raises(DataError, match="no token for"):
        encode_text("<|user|>", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no token that a text begins with"):
        encode_text("a", tokenizer)
