"""A sweep as its folders tell it: a table, failures, a summary notebook."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.errors import RunError
from workbench.runs.records import PARAMETER, RESULT
from workbench.runs.store import JOB_NAME
from workbench.runs.sweep_runs import (
    CANCELLED,
    FINISHED,
    RUNNING,
    WAITING,
    SweepRun,
    read_sweep_run,
)

SUMMARY = "summary.ipynb"


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep."""

    root: Path
    runs: list[SweepRun]

    @property
    def summary(self) -> Path:
        """The executed notebook that compares the runs."""
        return self.root / SUMMARY

    @property
    def failures(self) -> list[SweepRun]:
        """Runs that ended without success: `.result` has the error, its cell and traceback."""
        return [r for r in self.runs if r.state not in (FINISHED, WAITING, RUNNING, CANCELLED)]

    @property
    def table(self) -> pd.DataFrame:
        """One row a run: parameters, how it went, the last loss, and what the notebook recorded.

        A parameter that is called like a column of the rest, such as `seconds`, gets the prefix
        `parameters.`, and a recorded name that is taken already `result.`.
        """
        return pd.DataFrame([_row(run) for run in self.runs])

    def __repr__(self) -> str:
        counts = Counter(run.state for run in self.runs)
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        return f"sweep of {len(self.runs)} runs in {self.root}: {states}"


def read_sweep(root: str | os.PathLike) -> SweepResult:
    """All runs of a sweep, from its folder; one that goes on in another process as it is now.

    Raises:
        RunError: there are none.
        FileFormatError: a run's job.json is damaged.
    """
    root = Path(root)
    try:
        folders = [path for path in root.iterdir() if os.path.lexists(path / JOB_NAME)]
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror})", where=root) from None
    if not folders:
        raise RunError("holds no sweep", where=root)
    runs = [read_sweep_run(folder) for folder in folders if not folder.is_symlink()]
    return SweepResult(root, sorted(runs, key=_order))


def _order(run: SweepRun) -> list[tuple[bool, object]]:
    """By the parameters' values, numbers before texts."""
    values = run.parameters.values()
    numbers = [isinstance(value, int | float) for value in values]
    return [(not number, value if number else str(value)) for number, value in zip(numbers, values)]


def _row(run: SweepRun) -> dict[str, object]:
    how = {
        "state": run.state,
        "attempts": run.attempts,
        "seconds": round(run.result.seconds, 2),
        "overhead_seconds": round(run.overhead_seconds, 2),
        "peak_bytes": run.result.peak_bytes,
        "loss": run.progress.get("loss"),
    }
    last = {"error": run.result.error, "folder": run.folder.name}
    taken = how.keys() | last.keys()
    row = {
        f"{PARAMETER}{name}" if name in taken else name: value
        for name, value in run.parameters.items()
    }
    row |= how
    for name, value in run.results.items():
        row[f"{RESULT}{name}" if name in row or name in last else name] = value
    return row | last
