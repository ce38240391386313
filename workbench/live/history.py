"""A run's reports as columns that grow, and few enough points of them to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from workbench.tuning.config import StepReport

SMOOTHING = 0.85  # weight of the past in a smoothed column
POINTS = 600  # of a line, at most: a picture is about twice as many pixels wide
FIRST_ROOM = 256  # rows; doubled whenever they are full
FROM_REPORT = {  # column → field
    "step": "step",
    "loss": "loss",
    "valid": "valid_loss",
    "rate": "learning_rate",
    "norm": "grad_norm",
    "speed": "tokens_per_second",
    "active": "active_bytes",
    "cache": "cache_bytes",
    "peak": "peak_bytes",
    "process": "process_bytes",
}
SMOOTHED = ("loss", "speed", "norm")
COLUMNS = (*FROM_REPORT, *(f"smooth {name}" for name in SMOOTHED), "limit")


class History:
    """What the reports of a run hold, as one array a column; NaN where a report has nothing.

    Args:
        reports: of the steps so far.
        limit_of: report → process memory at which the run is stopped, or None.
    """

    def __init__(
        self,
        reports: Sequence[StepReport] = (),
        limit_of: Callable[[StepReport], int | None] = lambda report: None,
    ):
        self.last: StepReport | None = None
        self.first: StepReport | None = None
        self._limit_of, self._count = limit_of, 0
        self._means = dict.fromkeys(SMOOTHED, 0.0)
        self._seen = dict.fromkeys(SMOOTHED, 0)
        self._rows = np.full((len(COLUMNS), FIRST_ROOM), np.nan)
        self.extend(reports)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, column: str) -> np.ndarray:
        """A column (len(self),); it is a view, and read-only by agreement."""
        return self._rows[COLUMNS.index(column), : self._count]

    def extend(self, reports: Sequence[StepReport]) -> None:
        """Take in further steps."""
        for report in reports:
            values = [getattr(report, field) for field in FROM_REPORT.values()]
            smooth = [self._smooth(report, name) for name in SMOOTHED]
            row = [*values, *smooth, self._limit_of(report)]
            if self._count == self._rows.shape[1]:
                self._rows = np.pad(self._rows, ((0, 0), (0, self._count)), constant_values=np.nan)
            self._rows[:, self._count] = np.array(row, dtype=np.float64)  # None becomes NaN
            self._count += 1
            self.first, self.last = self.first or report, report

    def _smooth(self, report: StepReport, name: str) -> float:
        """Exponential moving average, corrected for its start (Kingma and Ba 2015, section 3).

        What is not finite, of a step that was skipped, is left out.
        """
        value = getattr(report, FROM_REPORT[name])
        if math.isfinite(value):
            self._means[name] = SMOOTHING * self._means[name] + (1 - SMOOTHING) * value
            self._seen[name] += 1
        seen = self._seen[name]
        return self._means[name] / (1 - SMOOTHING**seen) if seen else math.nan

    @property
    def best_validation(self) -> tuple[int, float] | None:
        """Step and loss of the best validation; None before the first."""
        valid = self["valid"]
        if not np.isfinite(valid).any():
            return None
        at = int(np.nanargmin(np.where(np.isfinite(valid), valid, np.nan)))
        return int(self["step"][at]), float(valid[at])


def thinned(
    steps: np.ndarray, values: np.ndarray, points: int = POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """The finite points of a line, or, if they are many, a selection with the same outline.

    Each stretch of a long line is drawn by its smallest and its largest value, where they stand:
    what a plot of all points would cover at this width (M4 without its ends, Jugel et al. 2014).

    Returns:
        steps and values, (n,) each, n ≤ points.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if len(values) <= points:
        return steps, values
    size = -(-len(values) // (points // 2))
    padded = np.pad(values, (0, -len(values) % size), mode="edge").reshape(-1, size)
    starts = np.arange(len(padded)) * size
    chosen = np.concatenate([starts + padded.argmin(axis=1), starts + padded.argmax(axis=1)])
    chosen = np.unique(np.minimum(chosen, len(values) - 1))
    return steps[chosen], values[chosen]
