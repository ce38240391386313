"""A run drawn again from its folder."""

from __future__ import annotations

import json
import os
import time
from functools import cached_property
from pathlib import Path

from workbench.errors import ConfigError, RunError
from workbench.live.history import History
from workbench.live.outputs import HTML, TEXT, Slot, visible
from workbench.live.run_chart import RunChart
from workbench.live.samples import Sample, read_samples, samples_html
from workbench.live.tiles import Status, heading_html
from workbench.probes.guard import MemoryGuard
from workbench.runs.store import CONFIG_NAME, METRICS_NAME, read_rows
from workbench.tuning.config import StepReport


class ShownRun:
    """A run as its folder tells it; as a cell's last value it shows what the live panel showed."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.reports: list[StepReport] = read_reports(folder)
        self.samples: list[Sample] = read_samples(folder)
        written = (self.folder / METRICS_NAME).stat().st_mtime
        self._history = History(self.reports, _guard(self.folder).limit)
        last = self.reports[-1]
        seconds = sum(report.step_seconds for report in self.reports)
        day = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
        state = "Finished" if last.step >= last.total_steps else "Not finished"
        note = f"last step written {day}"
        self.status = Status(state, last.step, last.total_steps, seconds, note=note)

    @cached_property
    def data(self) -> bytes:
        """The chart as PNG bytes with a transparent ground."""
        return self._picture[0]

    @cached_property
    def _picture(self) -> tuple[bytes, tuple[int, int]]:
        chart = RunChart()
        chart.update(self._history)
        return chart.png(), chart.size

    def __repr__(self) -> str:
        return f"{self.status} · {self.reports[-1]}"

    def _ipython_display_(self) -> None:
        text = visible(repr(self))
        Slot().show({HTML: heading_html(self.status, self._history), TEXT: text})
        Slot().show_picture(*self._picture, text)
        if self.samples:
            Slot().show({HTML: samples_html(self.samples), TEXT: "samples"})


def show_run(folder: str | os.PathLike) -> ShownRun:
    """Draw a run from its folder: its numbers, its chart, and its samples if it has any.

    The run may have finished, been killed, or be going on in another process: what its metrics
    hold so far is drawn.

    Raises:
        RunError: the folder holds no metrics yet, or they are damaged or of another kind.
    """
    return ShownRun(folder)


def read_reports(folder: str | os.PathLike) -> list[StepReport]:
    """The reports of a run's steps, from its metrics.

    Raises:
        RunError: there are none yet, or they are damaged or of another kind.
    """
    rows = read_rows(folder, METRICS_NAME)
    if not rows:
        raise RunError("has not finished a step yet", where=folder)
    where = Path(folder) / METRICS_NAME
    return [StepReport.from_row(row, f"{where}:{number}") for number, row in enumerate(rows, 1)]


def _guard(folder: Path) -> MemoryGuard:
    """The guard that the run's configuration asks for; none if there is no such file."""
    try:
        train = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["train"]
        return MemoryGuard(train["memory_limit_bytes"])
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        return MemoryGuard(0)  # no limit is known, so no line is drawn
