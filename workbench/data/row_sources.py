"""Where rows come from: files, folders, data frames, Hugging Face data sets, lists, capitals."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.data.capitals import (
    TEST_PHRASINGS,
    TRAIN_PHRASINGS,
    VALID_PHRASINGS,
    all_capitals,
    capital_rows,
)
from workbench.data.rows import read_rows
from workbench.errors import ConfigError, DataError, check_number, check_whole

SPLITS = ("train", "valid", "test")
VALIDATION = ("valid", "validation", "val", "dev")
SPLIT_OF = {"train": "train", **dict.fromkeys(VALIDATION, "valid"), "test": "test"}
CURE = (
    "Give 'capitals', a folder with train.jsonl, a .jsonl file, a data frame, a Hugging Face "
    "data set, or a list of rows."
)
Rows = list[tuple[str, Mapping[str, object]]]  # (place, row)


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source, and what it is called."""

    name: str
    splits: dict[str, Rows]  # of SPLITS, those that there are


def read_source(
    source: object, limit: int | None = None, valid_fraction: float = 0.1, seed: int = 0
) -> SourceRows:
    """The rows of whatever holds rows, split.

    Args:
        source: `capitals`; a folder of train.jsonl, and valid.jsonl (or validation, val, dev) and
            test.jsonl if there are any; a .jsonl file to split; a pandas frame, a
            `datasets.Dataset` or a list of mappings to split; a mapping of those by split, such
            as a `datasets.DatasetDict`; a `datasets.IterableDataset`, of which no more is read
            than the limit asks for. Cells that are None or NaN are absent.
        limit: training rows that are used, from the start; None for all.
        valid_fraction: share of the rows that validate, of what comes without splits.
        seed: of that split.

    Raises:
        DataError: nothing there, no rows, or a line that is no row; "row 17" is `source[17]`.
        ConfigError: a setting is out of range, or a stream comes without a limit.
    """
    _check_settings(limit, valid_fraction, seed)
    if isinstance(source, str) and source == "capitals":
        name, splits = source, _capitals(limit)
    elif isinstance(source, str | os.PathLike):
        name, splits = Path(source).name, _from_disk(source, valid_fraction, seed)
    elif isinstance(source, Mapping):
        name, splits = _name_of(source), _from_splits(source, limit)
    else:
        # As many as leave `limit` rows after some have gone to validation.
        most = None if limit is None else math.ceil(limit / (1 - valid_fraction))
        name, splits = _name_of(source), _split(read_records(source, most), valid_fraction, seed)
    splits["train"] = splits["train"][:limit]
    return SourceRows(name, splits)


def _check_settings(limit: int | None, valid_fraction: float, seed: int) -> None:
    if limit is not None:
        check_whole("limit", limit, 1)
    check_whole("seed", seed, 0)
    check_number("valid_fraction", valid_fraction, 0)
    if valid_fraction >= 1:
        raise ConfigError(f"valid_fraction must be in [0, 1), got {valid_fraction}")


def _capitals(limit: int | None) -> dict[str, Rows]:
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


def _from_disk(source: str | os.PathLike, valid_fraction: float, seed: int) -> dict[str, Rows]:
    path = Path(os.path.expanduser(source))
    if os.path.exists(path) and not os.path.isdir(path):
        return _split(list(read_rows(path)), valid_fraction, seed)
    if not os.path.isdir(path):
        raise DataError(f"no data set {os.fspath(source)!r}", cure=CURE)
    there = split_files(path)
    if "train" not in there:
        raise DataError("holds no train.jsonl", where=path)
    return {s: list(read_rows(there[s], inside=path)) for s in SPLITS if s in there}


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split that a folder has, by the names of `SPLIT_OF`, in any case.

    Raises:
        DataError: the folder cannot be listed, or has two files for one split.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=folder) from None
    found: dict[str, Path] = {}
    for name in names:
        split = SPLIT_OF.get(name[:-6].lower()) if name.endswith(".jsonl") else None
        if split in found:
            what = f"holds {found[split].name} and {name}, both of them {split} rows"
            raise DataError(what, where=folder, cure="Rename or join them: one file a split.")
        if split is not None:
            found[split] = folder / name
    return found


def _from_splits(source: Mapping[str, object], limit: int | None) -> dict[str, Rows]:
    splits: dict[str, Rows] = {}
    for key, part in source.items():
        split = SPLIT_OF.get(key) if isinstance(key, str) else None
        if split is None or split in splits:
            raise DataError(
                f"has the split {repr(key)[:100]}{', too' if split else ''}",
                where=_name_of(source),
                cure="Give one split, as data['train_prefs'], or those you mean by their "
                "names: {'train': …, 'valid': …, 'test': …}.",
            )
        splits[split] = read_records(part, limit, f"{key} ")
    if "train" not in splits:
        raise DataError("has no split 'train'", where=_name_of(source))
    return splits


def _split(rows: Rows, valid_fraction: float, seed: int) -> dict[str, Rows]:
    order = np.random.default_rng(seed).permutation(len(rows))
    num_valid = min(round(valid_fraction * len(rows)), len(rows) - 1)
    valid, train = sorted(order[:num_valid]), sorted(order[num_valid:])
    return {"train": [rows[i] for i in train], "valid": [rows[i] for i in valid]}


def read_records(source: object, most: int | None = None, split: str = "") -> Rows:
    """The rows of what lies in memory or is streamed, by their numbers from 0.

    Args:
        source: a pandas frame, a `datasets.Dataset` or `IterableDataset`, or a list of mappings.
        most: rows that are read of a stream; None for a source that has an end.
        split: put before each row's number, with a blank.

    Raises:
        DataError: no rows, or one that cannot be read; names the row.
        ConfigError: a stream comes without `most`.
    """
    rows: Rows = []
    records = _records(source, most)
    try:
        for record in records:
            if not isinstance(record, Mapping):
                raise DataError(f"must be a mapping, got {type(record).__name__}")
            rows.append((f"{split}row {len(rows)}", _plain(record)))
    except Exception as error:  # a stream may raise whatever its files or its host gave it
        what = error.what if isinstance(error, DataError) else f"cannot be read ({error})"
        raise DataError(what, where=f"{split}row {len(rows)}") from error
    if not rows:
        raise DataError("holds no rows", where=f"{_name_of(source)} {split}".strip())
    return rows


def _records(source: object, most: int | None) -> Iterable[object]:
    hub = sys.modules.get("datasets")  # no dependency: whoever has such an object has the module
    if hub is not None and isinstance(source, hub.IterableDataset):
        if most is None:
            raise ConfigError(
                "a stream of rows needs a limit", cure="Say how many: load_dataset(…, limit=1000)."
            )
        return itertools.islice(source, most)
    if isinstance(source, pd.DataFrame):
        columns = [str(name) for name in source.columns]
        if len(set(columns)) < len(columns):
            raise DataError("two columns of the frame have one name", cure="Rename one of them.")
        cells = zip(*(source.iloc[:, place] for place in range(len(columns))))
        return (dict(zip(columns, row)) for row in cells)
    if isinstance(source, list | tuple) or (hub is not None and isinstance(source, hub.Dataset)):
        return source
    raise DataError(f"rows cannot be read from a {type(source).__name__}", cure=CURE)


def _plain(value: object) -> object:
    """A cell as JSON would give it; what a mapping has as None or NaN is absent."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not _is_absent(item)}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _is_absent(cell: object) -> bool:
    if isinstance(cell, float | np.floating):
        return bool(np.isnan(cell))
    return cell is None or cell is pd.NA or cell is pd.NaT


def _name_of(source: object) -> str:
    """What kind of object rows came from, and the name that it has, if any."""
    kind = type(source)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{_package(kind)} {kind.__name__}"
    first = next(iter(source.values()), None) if isinstance(source, Mapping) else source
    info = getattr(first, "info", None)
    own = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    return f"{name} {own}" if isinstance(own, str) else name


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
