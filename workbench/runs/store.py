"""One folder a run: its configuration, and metrics of every step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from workbench.errors import FileFormatError, RunError
from workbench.models.files import write_json
from workbench.runs import lock
from workbench.runs.commits import STAGING

CONFIG_NAME, METRICS_NAME, RESULTS_NAME = "config.json", "metrics.jsonl", "results.json"
JOB_NAME, JOB_FOLDER = "job.json", ".job"  # a sweep's; the folder is locked while a notebook runs
NOTEBOOK, FAILED, LOG = "notebook.ipynb", "failed.ipynb", "log.txt"  # likewise: what it executed
OF_A_SWEEP = {JOB_NAME, JOB_FOLDER, NOTEBOOK, FAILED, LOG, RESULTS_NAME}
OF_A_TRAINER = {METRICS_NAME, "checkpoints"}  # a run only beside its configuration


def new_run(root: str | os.PathLike, name: str) -> Path:
    """A folder that no other run uses: `root/name-001`, `root/name-002`, …

    The folder is made at once, so that two processes never get the same one.

    Raises:
        RunError: the folder cannot be made.
    """
    root = Path(root)
    for number in range(1, 100_000):
        folder = root / f"{name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not root.is_dir():
                raise RunError("is not a folder", where=root) from None
        except OSError as error:
            raise RunError(f"cannot be made ({error.strerror})", where=folder) from None
    raise RunError(f"holds too many runs called {name!r}", where=root)


class RunFolder:
    """A run's place on disk; this object is its only writer.

    Args:
        folder: empty or not there yet; or a run's, which then goes on. One that a sweep has made
            may also hold what its notebook wrote there before, and it stays.
        config: what the run is started with; written as JSON when it is new.

    Raises:
        RunError: the folder holds other files, is being written by another process, or cannot be
            written.
    """

    def __init__(self, folder: str | os.PathLike, config: Mapping[str, object]):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir()} - {lock.LOCK_NAME}
            unfinished = {name for name in names if name.startswith(STAGING)}
        except OSError as error:
            raise RunError(
                f"cannot be used as a run folder ({error.strerror})", where=folder
            ) from None
        self.goes_on = CONFIG_NAME in names  # whether it holds a run already
        if not self.goes_on:
            _require_room(self.folder, names - unfinished)
        lock.take(self.folder, self)
        for name in unfinished:  # files that a killed process left
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        if self.goes_on:
            return
        try:
            write_json(self.folder / CONFIG_NAME, config)
        except FileFormatError as error:
            raise RunError(f"cannot be written ({error.what})", where=folder) from error

    @property
    def is_mine(self) -> bool:
        """Whether this object is still the folder's writer; a later one of this process may be."""
        return lock.owner_of(self.folder) is self

    def cut(self, step: int, name: str = METRICS_NAME) -> None:
        """Drop the rows after a step, and a last line that is only half written.

        Raises:
            RunError: a row is damaged, or the file cannot be written.
        """
        path = self.folder / name
        if not path.exists():
            return
        kept = [row for row in read_rows(self.folder, name) if row.get("step", 0) <= step]
        end = sum(len(line) for line in path.read_bytes().splitlines(True)[: len(kept)])
        try:
            os.truncate(path, end)
        except OSError as error:
            raise RunError(f"cannot be written ({error.strerror})", where=path) from None

    def require_mine(self) -> None:
        """Raise RunError if a later trainer of this process has taken the folder."""
        if not self.is_mine:
            raise RunError(
                "has been taken over by a later trainer of this process",
                where=self.folder,
                cure="Use that trainer, or make a new one on this folder.",
            )

    def sync(self) -> None:
        """Force the metrics to the disk.

        Raises:
            RunError: the disk refuses, or a later trainer has taken the folder.
        """
        self.require_mine()
        path = self.folder / METRICS_NAME
        if not path.exists():
            return
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot be written ({error.strerror})", where=path) from None

    def append(self, row: Mapping[str, object], name: str = METRICS_NAME) -> None:
        """Add a row, such as a step's metrics, as a line; it is on its way to the disk then.

        Raises:
            RunError: the line cannot be written, or a later trainer has taken the folder.
        """
        self.require_mine()
        line = json.dumps(row) + "\n"  # NaN, of a validation, stays NaN
        path = self.folder / name
        written = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):  # a full disk may hold half of the line
                os.truncate(path, written)
            raise RunError(
                f"the row of step {row.get('step')} cannot be written ({error.strerror})",
                where=path,
                cure="Free some space; the trainer's weights and reports are intact.",
            ) from None


def _require_room(folder: Path, names: set[str]) -> None:
    """Raise RunError if a run that begins in a folder of such files would mix with them."""
    of_sweep = JOB_NAME in names
    others = names & OF_A_TRAINER if of_sweep else names - OF_A_SWEEP
    if others:
        cure = "Give each run its own folder: wb.new_run('runs', 'name') makes one."
        if of_sweep:
            cure = f"Let the notebook write {' and '.join(sorted(others))} under another name."
        raise RunError("holds files, but no run", where=folder, cure=cure)


def read_metrics(folder: str | os.PathLike) -> pd.DataFrame:
    """A run's metrics, one row a step; a last line that is only half written is left out.

    Raises:
        RunError: there are none, or a line is damaged.
    """
    return pd.DataFrame(read_rows(folder, METRICS_NAME))


def read_rows(folder: str | os.PathLike, name: str) -> list[dict[str, object]]:
    """The rows of one of a run's files; a last line that is only half written is left out.

    Raises:
        RunError: there is no such file, or a line is damaged.
    """
    path = Path(folder) / name
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"has no readable {name} ({error})", where=folder) from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"is damaged ({error})", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise RunError("is damaged (not a JSON object)", where=f"{path}:{number}")
        rows.append(row)
    return rows


def as_config(**parts: object) -> dict[str, object]:
    """Dataclasses and plain values as one JSON object."""
    return {
        name: dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part
        for name, part in parts.items()
    }
