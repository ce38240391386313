"""One run of a sweep, and what its folder says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import FileFormatError, RunError
from workbench.models.files import read_json, write_json
from workbench.runs.digest import open_plain
from workbench.runs.jobs import JobResult
from workbench.runs.records import MAX_NAME, printable
from workbench.runs.store import JOB_NAME, METRICS_NAME, RESULTS_NAME

WAITING, RUNNING, FINISHED, CANCELLED = "waiting", "running", "finished", "cancelled"
STATES = (WAITING, RUNNING, FINISHED, "failed", "killed", CANCELLED)
TAIL_BYTES = 65_536  # of the metrics; a row has a few hundred
KINDS: dict[str, type | tuple[type, ...]] = {  # of what job.json holds
    "notebook": str,
    "code": str,
    "parameters": dict,
    "state": str,
    "attempts": int,
    "seconds": (int, float),
    "cells_seconds": (int, float),
    "peak_bytes": int,
    "error": str,
    "cell": (int, type(None)),
    "traceback": str,
}


@dataclass
class SweepRun:
    """A notebook with one combination of parameters, in a folder of its own."""

    folder: Path
    notebook: str  # its file's name
    code: str  # digest of the notebook's code cells
    parameters: dict[str, object]
    attempts: int = 0  # of the sweep that ran last
    result: JobResult = dataclasses.field(default_factory=lambda: JobResult(WAITING))
    _started: float = 0.0  # of the attempt, while this process waits for it

    @property
    def state(self) -> str:
        """waiting, running, finished, failed, killed or cancelled."""
        return self.result.state

    @property
    def seconds(self) -> float:
        """Time that the attempt takes so far, or took."""
        return time.monotonic() - self._started if self.state == RUNNING else self.result.seconds

    @property
    def overhead_seconds(self) -> float:
        """What the last attempt took beside the notebook's cells; the kernel's start is in it."""
        return max(0.0, self.result.seconds - self.result.cells_seconds)

    @property
    def progress(self) -> dict[str, float]:
        """The newest `step`, `total_steps` and `loss` of its metrics, as far as they are there."""
        row = _last_row(self.folder / METRICS_NAME)
        known = {name: row.get(name) for name in ("step", "total_steps", "loss")}
        return {name: value for name, value in known.items() if _is_finite(value)}

    @property
    def results(self) -> dict[str, object]:
        """What the notebook recorded: numbers and strings of results.json; nothing if damaged."""
        with contextlib.suppress(FileFormatError):
            content = read_json(self.folder / RESULTS_NAME)
            return {
                printable(name, MAX_NAME): _encodable(value) if isinstance(value, str) else value
                for name, value in content.items()
                if isinstance(value, bool | int | float | str)
            }
        return {}

    def begin(self) -> None:
        """Another attempt starts now; what earlier ones took of the memory stays known.

        Raises:
            RunError: job.json cannot be written.
        """
        self.attempts, self._started = self.attempts + 1, time.monotonic()
        self.result = JobResult(RUNNING, peak_bytes=self.result.peak_bytes)
        self.save()

    def save(self) -> None:
        """Write job.json.

        Raises:
            RunError: it cannot be written; the one before is intact.
        """
        content = {
            "notebook": self.notebook,
            "code": self.code,
            "parameters": self.parameters,
            "attempts": self.attempts,
            **dataclasses.asdict(self.result),
        }
        try:
            write_json(self.folder / JOB_NAME, content)
        except FileFormatError as error:
            cure = "Free some space, and start the sweep again: it goes on."
            raise RunError(error.what, where=error.where, cure=cure) from None


def read_sweep_run(folder: str | os.PathLike) -> SweepRun:
    """A sweep's run from its folder.

    Raises:
        FileFormatError: its job.json is absent, damaged, or another program's.
    """
    folder = Path(folder)
    content = read_json(folder / JOB_NAME)
    for name, kind in KINDS.items():
        value = content.get(name)
        wrong = not isinstance(value, kind) or isinstance(value, bool) or name not in content
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise FileFormatError(
                f"has no proper {name!r}",
                where=folder / JOB_NAME,
                cure="Delete the file to run this combination again.",
            )
    if content["state"] not in STATES:
        raise FileFormatError(f"has the state {content['state'][:50]!r}", where=folder / JOB_NAME)
    fields = {field.name: content[field.name] for field in dataclasses.fields(JobResult)}
    own = {name: content[name] for name in ("notebook", "code", "parameters", "attempts")}
    return SweepRun(folder, result=JobResult(**fields), **own)


def _last_row(path: Path) -> Mapping[str, object]:
    """The last whole row of a run's metrics; nothing where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open_plain(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read(2 * TAIL_BYTES).split(b"\n")[:-1]
        row = json.loads(lines[-1]) if lines else {}
        return row if isinstance(row, dict) else {}
    return {}


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # a whole number may be any


def _encodable(text: str) -> str:
    """A text that can be printed and sent: half of a surrogate pair cannot."""
    return text.encode("utf-8", "replace").decode()
