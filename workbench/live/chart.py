"""Loss and memory, drawn while a model trains."""

from __future__ import annotations

import time
from collections.abc import Sequence

from matplotlib.axes import Axes

from workbench.live.figures import INK, add_legend, name_axes, new_figure, plain, png
from workbench.tuning.config import StepReport

LOSS, SMOOTH, VALID = "#9ab8e8", "#2f6fde", "#e8743b"
ACTIVE, CACHE, PEAK, PROCESS = "#2a9d8f", "#d9a520", "#8a63d2", "#e05260"
SMOOTHING = 0.85  # weight of the past in the smoothed loss
MIN_SECONDS = 1.0  # between two pictures
COST_FACTOR = 15  # a picture that takes 0.1 s is drawn at most every 1.5 s
GIGA = 1e9


class TrainingChart:
    """A picture of a training run that updates in its notebook cell.

    `add` each report; the picture is drawn anew at most once a second, and never so often that
    drawing costs more than a fifteenth of the time. `close` draws the last one, which is what the
    saved notebook shows.
    """

    def __init__(self, reports: Sequence[StepReport] = ()):
        self.reports = list(reports)  # of a run that goes on
        self.draw_seconds = 0.0  # spent on drawing in all
        self._handle = None
        self._next_draw = 0.0

    @property
    def smoothed_loss(self) -> float:
        """The training loss now, averaged over the last steps."""
        return smoothed([report.loss for report in self.reports])[-1]

    def add(self, report: StepReport) -> None:
        """Take in one step; redraw in the cell if it is time."""
        self.reports.append(report)
        if time.perf_counter() >= self._next_draw:
            self._show()

    def close(self) -> None:
        """Draw the final picture."""
        if self.reports:
            self._show()

    def _show(self) -> None:
        from IPython.display import Image, display

        started = time.perf_counter()
        picture = Image(draw(self.reports), format="png", width=960)
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)
        cost = time.perf_counter() - started
        self.draw_seconds += cost
        self._next_draw = time.perf_counter() + max(MIN_SECONDS, COST_FACTOR * cost)


def draw(reports: Sequence[StepReport]) -> bytes:
    """The loss and memory chart of a run so far, as PNG bytes with a transparent ground."""
    figure = new_figure(12, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_loss(left, reports)
    _draw_memory(right, reports)
    figure.subplots_adjust(left=0.055, right=0.99, top=0.88, bottom=0.13, wspace=0.16)
    return png(figure)


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average, corrected for its start (Kingma and Ba 2015, section 3)."""
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**count))
    return result


def _draw_loss(axes: Axes, reports: Sequence[StepReport]) -> None:
    steps, losses = [r.step for r in reports], [r.loss for r in reports]
    averages = smoothed(losses)
    axes.plot(steps, losses, color=LOSS, linewidth=1.2, label="training, each step")
    axes.plot(steps, averages, color=SMOOTH, linewidth=2.4, label="training, smoothed")
    validated = [(r.step, r.valid_loss) for r in reports if r.valid_loss is not None]
    if validated:
        axes.plot(*zip(*validated), "o-", color=VALID, clip_on=False, label="validation")
    last = reports[-1]
    title = f"Step {last.step} of {last.total_steps}: loss {losses[0]:.2f} → {averages[-1]:.2f}"
    _finish(axes, title, "cross-entropy (nats a token)")
    axes.set_xlim(1, max(2, last.total_steps))


def _draw_memory(axes: Axes, reports: Sequence[StepReport]) -> None:
    steps = [r.step for r in reports]
    active = [r.active_bytes / GIGA for r in reports]
    cache = [r.cache_bytes / GIGA for r in reports]
    axes.stackplot(
        steps, active, cache, colors=[ACTIVE, CACHE], alpha=0.75, labels=["MLX active", "MLX cache"]
    )
    peak = [r.peak_bytes / GIGA for r in reports]
    process = [r.process_bytes / GIGA for r in reports]
    axes.plot(steps, peak, color=PEAK, linewidth=1.8, linestyle="--", label="MLX peak")
    axes.plot(steps, process, color=PROCESS, linewidth=2.4, label="process")
    axes.set_ylim(0, 1.45 * max(*process, *peak))  # room for the legend above the lines
    last = reports[-1]
    _finish(axes, f"The process holds {last.process_bytes / GIGA:.1f} GB", "memory (GB)")
    axes.set_xlim(1, max(2, last.total_steps))


def _finish(axes: Axes, title: str, unit: str) -> None:
    name_axes(axes, "step (optimizer updates)", unit)
    axes.set_title(title, color=INK, fontsize=13, loc="left", fontweight="bold")
    axes.grid(alpha=0.25, color=INK)
    plain(axes)
    axes.set_ylim(bottom=0)
    add_legend(axes, loc="upper right", ncols=2)
