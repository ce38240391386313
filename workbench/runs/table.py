"""Every run as a row of a table, to be filtered and sorted by pandas."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
import pandas as pd

from workbench.errors import ConfigError, RunError
from workbench.runs.index import refreshed
from workbench.runs.records import FIRST, LAST, NUMBERS, PARAMETER, RESULT, Record, state_of

WHOLE = ("steps", "total_steps", "best_step", "peak_bytes", "process_bytes")
PREFIXES = ("", RESULT, PARAMETER, "train.")  # what a short name may stand for, in this order
MAX_COLUMNS = 1000  # of results, and of configuration: those that most runs have


def runs(root: str | os.PathLike = "runs", refresh: bool = True) -> pd.DataFrame:
    """Every run below a folder, a row each; what is new is read, the rest is known from an index.

    The index is `index.sqlite` in that folder. It may be deleted at any time.

    Args:
        root: the folder that the runs are in, at most four folders deep.
        refresh: look at the folders; if not, the table is what the index knew the last time.

    Returns:
        `name` (the folder, from the root on); `state`: finished, running (somebody holds its
        lock), stopped before its last step, failed (a sweep's notebook), empty (no step yet) or
        damaged (see `problem`); `started`; `steps`, `total_steps`; `loss` of the last step (nats);
        `best_valid_loss` at `best_step`; `tokens_per_second` (median of the last 100 steps);
        `seconds` of all steps and validations; `peak_bytes` of MLX and `process_bytes` (largest);
        `result.…`, as `record_results` keeps them; configuration, `train.learning_rate`, and a
        sweep's `parameters.…`; `problem`; `folder`.

    Raises:
        RunError: there is no such folder, or it holds too many others.

    Warns:
        IndexWarning: the index cannot be used; the table is whole all the same.
    """
    root = os.fspath(root)
    records = refreshed(root, as_it_is=not refresh)
    folders = [root if r.name == "." else os.path.join(root, r.name) for r in records]
    columns: dict[str, object] = {
        "name": [record.name for record in records],
        "state": [state_of(*pair) for pair in zip(records, folders)],
        "started": pd.to_datetime([r.started for r in records], unit="s", utc=True).floor("s"),
    }
    for name in NUMBERS:
        kind = "Int64" if name in WHOLE else "float64"
        columns[name] = pd.array([getattr(record, name) for record in records], dtype=kind)
    columns |= _further(records)
    return pd.DataFrame(columns | {"problem": [r.problem for r in records], "folder": folders})


def _further(records: Sequence[Record]) -> dict[str, list[object]]:
    """Results and configurations as columns; None where a run lacks one."""
    alike: dict[tuple[str, ...], list[int]] = {}  # most runs have the same names
    for place, record in enumerate(records):
        alike.setdefault(record.names, []).append(place)
    counts: Counter[str] = Counter()
    for names, places in alike.items():
        counts.update(dict.fromkeys(names, len(places)))
    kept = {name for name, _ in counts.most_common(MAX_COLUMNS)}
    columns = {name: [None] * len(records) for name in counts if name in kept}
    for names, places in alike.items():
        for name, values in zip(names, zip(*(records[place].values for place in places))):
            if name in kept:
                column = columns[name]
                for place, value in zip(places, values):
                    column[place] = value
    return dict(sorted(columns.items(), key=lambda item: not item[0].startswith(RESULT)))


def compare_configs(table: pd.DataFrame | str | os.PathLike) -> pd.DataFrame:
    """Of the configuration, only what is not the same in all runs; a row each, by name.

    Args:
        table: of `runs`, or a part of it; or the folder that the runs are in.
    """
    table = as_table(table)
    own = [n for n in table if n not in FIRST + LAST and not str(n).startswith(RESULT)]
    different = [name for name in own if _told_apart(table[name]).nunique(dropna=False) > 1]
    return table.set_index("name")[different]


def _told_apart(column: pd.Series) -> pd.Series:
    """A column whose truth values are not equal to 1 and 0, as Python has them."""
    if column.dtype != object:
        return column
    return column.map(lambda value: (value,) if isinstance(value, bool) else value)


def best_run(
    table: pd.DataFrame | str | os.PathLike,
    by: str = "best_valid_loss",
    largest: bool = False,
) -> pd.Series:
    """The run with the smallest number of a column; its row, such as `best.folder`.

    Args:
        table: of `runs`, or a part of it; or the folder that the runs are in.
        by: a column; `accuracy` is enough for `result.accuracy`, `rank` for `parameters.rank`.
        largest: take the largest number instead.

    Raises:
        ConfigError: there is no such column, or it holds no numbers.
        RunError: no run has this number.
    """
    table = as_table(table)
    column = column_of(table, by)
    try:
        numbers = pd.to_numeric(table[column]).astype("float64").to_numpy()
    except (ValueError, TypeError):
        raise ConfigError(f"{column} holds what is no number") from None
    finite = np.flatnonzero(np.isfinite(numbers))
    if not len(finite):
        raise RunError(f"no run has a {column}", cure="Look at the table's states and problems.")
    best = (np.argmax if largest else np.argmin)(numbers[finite])
    return table.iloc[finite[best]]  # by place: tables that were put together repeat their labels


def column_of(table: pd.DataFrame, name: str) -> str:
    """A column's whole name from a short one: accuracy → result.accuracy, rank → parameters.rank.

    Raises:
        ConfigError: there is no such column, or more than one.
    """
    if not isinstance(name, str):
        raise ConfigError(f"a column is named by a text, not {name!r}")
    for prefix in PREFIXES:
        if prefix + name in table:
            return prefix + name
    ends = [column for column in table if str(column).endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    close = get_close_matches(name, [str(c).rpartition(".")[2] for c in table], 5, 0.5)
    cure = f"Name one of {', '.join(ends or dict.fromkeys(close) or map(str, table))[:300]}."
    what = "several columns" if ends else "no column"
    raise ConfigError(f"the table has {what} {name!r}", cure=cure)


def as_table(table: pd.DataFrame | str | os.PathLike) -> pd.DataFrame:
    """A table of runs as it is; of a folder, the table of its runs.

    Raises:
        ConfigError: it is another table.
    """
    if not isinstance(table, pd.DataFrame):
        return runs(table)
    missing = [name for name in ("name", "state", "folder") if name not in table]
    if missing:
        cure = "Give what wb.runs returned, or rows of it."
        raise ConfigError(f"the table has no {', '.join(missing)}", cure=cure)
    return table
