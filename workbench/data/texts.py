"""A plain text becomes a part to train on, a part held out, and rows of one length."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.data.chats import refusing
from workbench.data.datasets import Dataset
from workbench.data.examples import Example
from workbench.data.text_tokenizers import blocks
from workbench.errors import ConfigError, DataError, check_number, check_whole, is_text
from workbench.models.regular_files import check_regular, open_regular

MIN_TEXT_BYTES = 1_000  # fewer teach nothing
MAX_TEXT_BYTES = 64_000_000  # a text is held in memory, as characters and as tokens
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, repr=False)
class Corpus:
    """A text to train on, and one that is held out.

    Raises:
        DataError: one of them is no text that UTF-8 can hold, or empty.
    """

    name: str
    train: str
    held_out: str

    def __post_init__(self):
        _check_text(self.train, f"{self.name}, train")
        _check_text(self.held_out, f"{self.name}, held out")

    def __str__(self) -> str:
        sizes = [f"{num_bytes(text):,} bytes" for text in (self.train, self.held_out)]
        return f"{self.name}: train {sizes[0]}, held out {sizes[1]}"

    __repr__ = __str__


def num_bytes(text: str) -> int:
    """Size of a text in UTF-8."""
    return len(text.encode())


def read_corpus(path: str | os.PathLike, *, held_out_fraction: float = 0.1) -> Corpus:
    """Read a text file; its last part is held out, from the beginning of a line if there is one.

    Args:
        path: a file in UTF-8, from 1,000 bytes to 64 MB.
        held_out_fraction: share of the characters that is held out.

    Raises:
        DataError: no such file, no regular file, too small, too large, or not UTF-8; names the
            first byte that is not.
        ConfigError: held_out_fraction is not between 0 and 1.
    """
    check_number("held_out_fraction", held_out_fraction)
    if not 0 < held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction must be in (0, 1), got {held_out_fraction}")
    path = Path(os.path.expanduser(path))
    text = _read(path)
    least = max(1, round(len(text) * (1 - held_out_fraction)))
    place = min(least, len(text) - 1)
    line = text.find("\n", place, place + (len(text) - place) // 2) + 1
    return Corpus(path.name, text[: line or place], text[line or place :])


def _read(path: Path) -> str:
    size = check_regular(path, kind=DataError)
    if size > MAX_TEXT_BYTES:
        raise DataError(f"is larger than {MAX_TEXT_BYTES:,} bytes", where=path, cure="Cut it.")
    try:
        with open_regular(path, kind=DataError) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 (byte {error.start} of the file)", where=path, cure="Save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None
    if len(content) < MIN_TEXT_BYTES:
        what = f"has {len(content)} bytes" if content else "is empty"
        cure = f"Give a text of {MIN_TEXT_BYTES:,} bytes or more."
        raise DataError(what, where=path, cure=cure)
    return text.removeprefix(BYTE_ORDER_MARK)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, where: str = "text") -> np.ndarray:
    """Token ids (T,) of a text after the token that texts begin with, so that all can be targets.

    Special tokens that the text spells act, as in a row of `text`.

    Raises:
        DataError: no text, an empty one, one that the tokenizer has no tokens for, or a tokenizer
            without a token that texts begin with.
    """
    _check_text(text, where)
    how = {"add_special_tokens": False, "split_special_tokens": False}
    with refusing(where):
        parts = [np.array(tokenizer.encode(b, **how), np.int32) for b in blocks(text, tokenizer)]
    ids = np.concatenate([[first_token(tokenizer, where)], *parts], dtype=np.int32)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids[1:]:
        raise DataError(
            "holds characters that the tokenizer has no token for",
            where=where,
            cure="Use a tokenizer of bytes.",
        )
    return ids


def _check_text(text: object, where: str) -> None:
    if not text or not is_text(text):
        raise DataError("must be a text with characters that UTF-8 can hold", where=where)


def first_token(tokenizer: PreTrainedTokenizerBase, where: str = "text") -> int:
    """The token that the first token of a text is conditioned on: begin of text, or else its end.

    Raises:
        DataError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError(
        "the tokenizer has no token that a text begins with",
        where=where,
        cure="Give a prompt that is not empty.",
    )


def cut_rows(tokens: np.ndarray, window: int, name: str) -> list[Example]:
    """Rows that a network with `window` positions reads: every token but the first is a target.

    A row begins with the last target of the one before, and has `window` targets; the last row
    may have fewer.

    Args:
        tokens: (T,) ids, T from 2.
        window: targets of a row.
        name: of the text, for messages.
    """
    rows = []
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window + 1]
        where = f"{name}, tokens {start}–{start + len(part) - 1}"
        rows.append(Example(part, np.ones(len(part), dtype=bool), where))
    return rows


def text_dataset(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, window: int) -> Dataset:
    """Both parts of a corpus in rows of `window` targets, in the order of the text.

    The rows take some 7 bytes a token. While it is made, a byte of text takes up to 15 bytes of
    memory with tokens of single bytes and up to 9 with learnt ones, measured at 8 MB; a text
    without a blank, which is tokenised as a whole, up to 180.

    Raises:
        DataError: the tokenizer refuses a part.
        ConfigError: window is not a whole number from 2.
    """
    check_whole("window", window, 2)
    parts = {"train": corpus.train, "held out": corpus.held_out}
    rows = [
        cut_rows(encode_text(text, tokenizer, f"{corpus.name}, {part}"), window, f"{part} text")
        for part, text in parts.items()
    ]
    return Dataset(corpus.name, *rows, allow_special_tokens=True)
