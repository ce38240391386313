"""Training data that is read while it is trained on: JSONL of any size, plain or gzip."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from workbench.data.datasets import Dataset, load_dataset
from workbench.data.examples import TRAIN_ON, Example, encode_row
from workbench.data.row_sources import split_files
from workbench.data.special_tokens import require_tokenizer
from workbench.data.stream_files import StreamFile, find_files
from workbench.errors import ConfigError, DataError, check_whole

MAX_BUFFER_ROWS = 250_000  # a checkpoint names where each lies
WHOLE_NUMBERS = {"buffer_rows": 1, "seed": 0, "max_length": 2, "max_bad_lines": 0}  # smallest
MEGA = 1e6


@dataclass(frozen=True, repr=False, kw_only=True)
class StreamDataset(Dataset):
    """Files whose rows are read, shuffled and tokenised as training asks for them.

    `train` is empty; `valid` is held in memory. A `Trainer` takes it in place of a `Dataset`.
    """

    files: tuple[StreamFile, ...]
    tokenizer: PreTrainedTokenizerBase
    buffer_rows: int  # lines among which each row is drawn
    seed: int  # of the order
    max_length: int  # tokens of a row that are kept
    train_on: str  # targets of a chat, see `encode_row`
    max_bad_lines: int  # that are skipped

    def __post_init__(self):
        for name, smallest in WHOLE_NUMBERS.items():
            check_whole(name, getattr(self, name), smallest)
        if self.buffer_rows > MAX_BUFFER_ROWS:
            what = f"buffer_rows must be at most {MAX_BUFFER_ROWS}, got {self.buffer_rows}"
            raise ConfigError(what)
        if self.train_on not in TRAIN_ON:
            what = f"train_on {self.train_on!r} is unknown"
            raise ConfigError(what, cure=f"Use one of {TRAIN_ON}.")

    def encode(self, row: Mapping[str, object], where: str) -> Example:
        """Tokenise a row as this stream does; raises DataError as `encode_row`."""
        return encode_row(
            row,
            self.tokenizer,
            max_length=self.max_length,
            train_on=self.train_on,
            allow_special_tokens=self.allow_special_tokens,
            where=where,
        )

    @property
    def settings(self) -> dict[str, object]:
        """What the rows and their order depend on beside the files, as JSON."""
        vocabulary = sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template
        return {
            "stream.buffer_rows": self.buffer_rows,
            "stream.seed": self.seed,
            "stream.max_length": self.max_length,
            "stream.train_on": self.train_on,
            "stream.allow_special_tokens": self.allow_special_tokens,
            "stream.tokenizer": hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16],
        }

    def __str__(self) -> str:
        size = sum(file.size for file in self.files) / MEGA
        packed = sum(file.is_gzip for file in self.files)
        gzip = f" ({packed} gzip)" if packed else ""
        return (
            f"{self.name}: stream of {len(self.files)} files{gzip}, {size:.1f} MB; shuffled among "
            f"{self.buffer_rows} rows; valid {len(self.valid)} rows"
        )

    __repr__ = __str__


def stream_dataset(
    source: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    buffer_rows: int = 10_000,
    seed: int = 0,
    max_length: int = 2048,
    train_on: str = "assistant",
    allow_special_tokens: bool = False,
    max_bad_lines: int = 100,
    valid: object = None,
) -> StreamDataset:
    """Training data that is read while it is trained on; see `stream_feed` for the order.

    Args:
        source: a JSONL file, plain or gzip, a folder or a pattern of them, or a list of these; see
            `find_files`. Rows have the forms of `encode_row`.
        tokenizer: of the model.
        buffer_rows: lines among which each row is drawn; fewer, if they are long (256 MB). Rows
            that lie farther apart are hardly mixed: a sorted file is to be shuffled before.
        seed: of the order; each pass has its own.
        max_length, train_on, allow_special_tokens: see `load_dataset`.
        max_bad_lines: that are skipped; one more raises. `trainer.feed.bad_lines` names the first.
        valid: rows that validate, held in memory: what `load_dataset` takes, none split off; of a
            source that has a split for it, that.

    Raises:
        DataError: no such files, a bad row in `valid`, or its file is one that is trained on.
        ConfigError: a setting is out of range, or no tokenizer.
    """
    require_tokenizer(tokenizer)
    files, is_one = find_files(source), isinstance(source, str | os.PathLike)
    rows = {"max_length": max_length, "train_on": train_on}
    rows["allow_special_tokens"] = allow_special_tokens
    held = [] if valid is None else _validation_rows(valid, tokenizer, rows)
    _require_apart(files, valid)
    name = Path(source).name if is_one else f"{len(files)} files"
    stream = {"files": files, "buffer_rows": buffer_rows, "seed": seed, **rows}
    stream |= {"tokenizer": tokenizer, "max_bad_lines": max_bad_lines}
    return StreamDataset(name=name, train=[], valid=held, **stream)


def _validation_rows(
    source: object, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, object]
) -> list[Example]:
    """The part of a source that is there for validation; all of it, if it has none."""
    loaded = load_dataset(source, tokenizer, valid_fraction=0, **settings)
    return loaded.valid or loaded.train


def _require_apart(files: Sequence[StreamFile], valid: object) -> None:
    """Raise DataError if the file that `valid` names, by whatever path, is one of the stream's."""
    if not isinstance(valid, str | os.PathLike) or valid == "capitals":
        return
    path = Path(os.path.expanduser(valid))
    if path.is_dir():
        there = split_files(path)
        path = there.get("valid", there["train"])
    for file in files:
        if os.path.samefile(file.path, path):
            raise DataError(
                "would be trained on and validate, too",
                where=file.path,
                cure="Leave it out of the stream's files: a folder keeps back valid.jsonl itself.",
            )
