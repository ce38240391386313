"""A chart for loops of one's own: `chart.add(report)` after each step."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.live.history import History
from workbench.live.outputs import Slot, kernel_shell
from workbench.live.pace import Pace
from workbench.live.run_chart import QUICK, SMALL, RunChart
from workbench.tuning.config import StepReport

MIN_SECONDS, SHARE = 1.0, 0.02  # between two pictures; of the time, for all of them


class TrainingChart:
    """A picture of a training run that updates in its notebook cell.

    `add` each report; the picture is drawn anew at most once a second, and only so often that
    drawing stays at a fiftieth of the time. `close` draws the last one, which is what the saved
    notebook shows. Outside of a notebook nothing is drawn.

    Args:
        reports: the steps so far of a run that goes on.
    """

    def __init__(self, reports: Sequence[StepReport] = ()):
        self._history = History(reports)
        self._slot = Slot() if kernel_shell() is not None else None
        self._chart: RunChart | None = None
        self._pace = Pace(MIN_SECONDS, SHARE)

    @property
    def draw_seconds(self) -> float:
        """Seconds spent on drawing in all."""
        return self._pace.seconds

    @property
    def smoothed_loss(self) -> float:
        """The training loss now, averaged over the last steps."""
        return float(self._history["smooth loss"][-1])

    def add(self, report: StepReport) -> None:
        """Take in one step; redraw in the cell if it is time."""
        self._history.extend([report])
        if self._pace.due:
            self._show(QUICK)

    def close(self) -> None:
        """Draw the final picture."""
        if len(self._history):
            self._show(SMALL)

    def _show(self, compression: int) -> None:
        if self._slot is None:
            return
        with self._pace.spending():
            self._chart = self._chart or RunChart()
            self._chart.update(self._history)
            picture = self._chart.png(compression)
            self._slot.show_picture(picture, self._chart.size, str(self._history.last))
