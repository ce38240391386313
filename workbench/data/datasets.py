"""A name, a file or a folder becomes train, validation and test examples."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.data.capitals import (
    TEST_PHRASINGS,
    TRAIN_PHRASINGS,
    VALID_PHRASINGS,
    all_capitals,
    capital_rows,
)
from workbench.data.examples import Example, encode_row
from workbench.data.rows import read_rows
from workbench.errors import ConfigError, DataError, check_number, check_whole

SPLITS = ("train", "valid", "test")
Rows = Iterable[tuple[str, Mapping[str, object]]]  # (place, row)


@dataclass(frozen=True, repr=False)
class Dataset:
    """Tokenised examples, split for training, validation and test.

    Special tokens that a message spells are text, unless `allow_special_tokens`; the description
    counts them.
    """

    name: str
    train: list[Example]
    valid: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    allow_special_tokens: bool = False

    @property
    def truncated(self) -> int:
        """Number of examples, over all splits, that were cut to max_length."""
        return sum(example.truncated for split in SPLITS for example in getattr(self, split))

    @property
    def num_spelled(self) -> int:
        """Number of special tokens, over all splits, that messages spell and that are text."""
        return sum(example.num_spelled for split in SPLITS for example in getattr(self, split))

    def __str__(self) -> str:
        parts = []
        for split in SPLITS:
            examples = getattr(self, split)
            tokens, targets = sum(map(len, examples)), sum(e.num_targets for e in examples)
            parts.append(f"{split} {len(examples)} rows, {tokens} tokens, {targets} supervised")
        cut = f"; {self.truncated} rows were cut to max_length" if self.truncated else ""
        spelled = f"; {self.num_spelled} special tokens in messages are text"
        special = spelled if self.num_spelled else ""
        if self.allow_special_tokens:
            special = "; special tokens in messages are control tokens"
        return f"{self.name}: {'; '.join(parts)}{cut}{special}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def load_dataset(
    source: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_length: int = 2048,
    train_on: str = "assistant",
    allow_special_tokens: bool = False,
    valid_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Read and tokenise a data set.

    Args:
        source: `capitals`, a folder of train.jsonl (and valid, test), or a .jsonl file to split.
        limit: training rows that are used, from the start; None for all.
        max_length: tokens of a row that are kept; `Dataset.truncated` counts the rows cut.
        train_on: targets of a chat, see `encode_row`.
        allow_special_tokens: whether those that messages spell act, see `encode_row`.
        valid_fraction: share of a single file's rows that validate.
        seed: of that split.

    Raises:
        DataError: nothing there, or a row that cannot be trained on; names the line.
        ConfigError: a setting is out of range.
    """
    _check_settings(limit, valid_fraction, seed)
    rows = _capitals(limit) if source == "capitals" else _from_disk(source, valid_fraction, seed)
    rows["train"] = rows["train"][:limit]
    encode = functools.partial(
        encode_row,
        tokenizer=tokenizer,
        max_length=max_length,
        train_on=train_on,
        allow_special_tokens=allow_special_tokens,
    )
    encoded = {
        split: [encode(row, where=place) for place, row in rows.get(split, ())] for split in SPLITS
    }
    return Dataset(Path(source).name, **encoded, allow_special_tokens=allow_special_tokens)


def _check_settings(limit: int | None, valid_fraction: float, seed: int) -> None:
    if limit is not None:
        check_whole("limit", limit, 1)
    check_whole("seed", seed, 0)
    check_number("valid_fraction", valid_fraction, 0)
    if valid_fraction >= 1:
        raise ConfigError(f"valid_fraction must be in [0, 1), got {valid_fraction}")


def _capitals(limit: int | None) -> dict[str, list]:
    # A limit takes whole capitals into validation and test, so that all is about the same ones.
    capitals = all_capitals()
    if limit is not None:
        capitals = capitals[: -(-limit // len(TRAIN_PHRASINGS))]
    phrasings = dict(zip(SPLITS, (TRAIN_PHRASINGS, VALID_PHRASINGS, TEST_PHRASINGS)))
    return {
        split: [
            (f"capitals, {split} row {number}", row)
            for number, row in enumerate(capital_rows(capitals, phrasings[split]), 1)
        ]
        for split in SPLITS
    }


def _from_disk(source: str | os.PathLike, valid_fraction: float, seed: int) -> dict[str, list]:
    path = Path(os.path.expanduser(source))
    if os.path.exists(path) and not os.path.isdir(path):
        return _split(list(read_rows(path)), valid_fraction, seed)
    if not os.path.isdir(path):
        raise DataError(
            f"no data set {os.fspath(source)!r}",
            cure="Give 'capitals', a folder with train.jsonl, or a .jsonl file.",
        )
    files = {split: path / f"{split}.jsonl" for split in SPLITS}
    there = {split: file for split, file in files.items() if os.path.lexists(file)}
    if "train" not in there:
        raise DataError("holds no train.jsonl", where=path)
    return {split: list(read_rows(file, inside=path)) for split, file in there.items()}


def _split(rows: list, valid_fraction: float, seed: int) -> dict[str, list]:
    order = np.random.default_rng(seed).permutation(len(rows))
    num_valid = min(round(valid_fraction * len(rows)), len(rows) - 1)
    valid, train = sorted(order[:num_valid]), sorted(order[num_valid:])
    return {"train": [rows[i] for i in train], "valid": [rows[i] for i in valid]}
