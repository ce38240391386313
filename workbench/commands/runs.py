"""List many runs in the terminal, or delete one."""

from __future__ import annotations

import argparse
import json
import math
import os

import numpy as np
import pandas as pd

from workbench.errors import ConfigError
from workbench.runs.deleting import delete_run
from workbench.runs.records import FIRST, LAST, PARAMETER, RESULT, stamp_of
from workbench.runs.table import column_of, compare_configs, runs

SHOWN = ("name", "state", "steps", "total_steps", "loss", "best_valid_loss", "seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `python -m workbench runs` understands."""
    parser.add_argument("--root", default="runs", help="the folder that the runs are in")
    parser.add_argument("--sort", metavar="COLUMN", help="by this column, the smallest first")
    parser.add_argument("--largest", action="store_true", help="with --sort: the largest first")
    parser.add_argument("--columns", metavar="A,B,…", help="which to show; 'all' shows every one")
    parser.add_argument("--limit", type=int, metavar="N", help="show the first N")
    parser.add_argument("--json", action="store_true", help="as JSON: every column, or --columns")
    parser.add_argument(
        "--delete", metavar="NAME", help="remove this run of the table, or folder, after a question"
    )
    parser.add_argument("--yes", action="store_true", help="with --delete: do not ask")


def run(options: argparse.Namespace) -> int:
    """List the runs, or delete one; returns the exit status."""
    if options.delete is not None:
        return _delete(_folder(options.root, options.delete), options.yes)
    table = runs(options.root)
    if options.sort:
        column = column_of(table, options.sort)
        table = table.sort_values(column, ascending=not options.largest, key=_sortable)
    if options.limit is not None:
        if options.limit < 1:
            raise ConfigError(f"--limit must be a whole number from 1, got {options.limit}")
        table = table.head(options.limit)
    table = table[_columns(table, options.columns, options.json)]
    if options.json:
        rows = zip(*([_as_json(value) for value in table[name]] for name in table))
        print(json.dumps([dict(zip(table, row)) for row in rows], indent=1, allow_nan=False))
    elif table.empty:
        print(f"No runs in {options.root}.")
    else:
        print(table.to_string(index=False, na_rep="–", float_format=lambda number: f"{number:.4g}"))
    return 0


def _columns(table: pd.DataFrame, wanted: str | None, every: bool) -> list[str]:
    """The columns to show."""
    if wanted == "all" or (every and not wanted):
        return list(table)
    if wanted:
        return [column_of(table, name.strip()) for name in wanted.split(",")]
    results = [name for name in table if name.startswith(RESULT)]
    parameters = [name for name in compare_configs(table) if name.startswith(PARAMETER)]
    parameters = [name for name in parameters if name != f"{PARAMETER}run_dir"]  # the name says it
    problems = [LAST[0]] if table[LAST[0]].any() else []
    return [*SHOWN, *parameters, *results, *problems]


def _as_json(value: object) -> object:
    """A cell of the table: numbers with all their digits; None for NaN, infinity and no date."""
    if pd.isna(value) or value in (math.inf, -math.inf):
        return None
    if isinstance(value, pd.Timestamp):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return value.item() if isinstance(value, np.generic) else value


def _sortable(column: pd.Series) -> pd.Series:
    """Numbers as numbers; a column that holds anything else as text."""
    try:
        return pd.to_numeric(column) if column.name not in FIRST else column
    except (ValueError, TypeError):
        return column.map(str)


def _folder(root: str, name: str) -> str:
    """The folder of a run: as the table names it, from the root on; or else a path."""
    listed = os.path.join(root, name)
    found = [path for path in (listed, name) if stamp_of(path)] or [name]
    if not all(os.path.samefile(path, found[0]) for path in found[1:]):
        cure = "Give the whole path of the one you mean."
        raise ConfigError(f"{name!r} is two runs: {' and '.join(found)}", cure=cure)
    return found[0]


def _delete(folder: str, agreed: bool) -> int:
    """Remove a run if its owner agrees."""
    if not agreed:
        try:
            answer = input(f"Delete the run {folder} and all that is in it? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.")
            return 1
    delete_run(folder)
    print(f"Deleted {folder}.")
    return 0
