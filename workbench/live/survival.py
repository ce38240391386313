"""A run that was killed and went on, drawn over one that nobody touched."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.errors import ConfigError
from workbench.live.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    add_legend,
    headline,
    label,
    name_axes,
    new_figure,
    plain,
    png,
)
from workbench.tuning.config import StepReport


def draw_survival(
    untouched: Sequence[StepReport],
    killed: Sequence[StepReport],
    resumed: Sequence[StepReport],
    first_step: int,
) -> bytes:
    """Loss of three runs: left alone, killed, and gone on with from a checkpoint, as PNG bytes.

    Args:
        untouched: reports of the run that nobody touched.
        killed: of the run until it was killed.
        resumed: of the whole run after it went on.
        first_step: the first step that was made after the kill.

    Raises:
        ConfigError: a run without a step.
    """
    if not untouched or not killed or not resumed:
        raise ConfigError("no steps to draw", cure="Give each run at least one report.")
    figure = new_figure(12, 4.2)
    axes = figure.subplots()
    style = {"color": BLUE, "linewidth": 9, "alpha": 0.3, "solid_capstyle": "round"}
    axes.plot(*_curve(untouched), **style, label="never touched")
    axes.plot(*_curve(killed), color=RED, linewidth=2.4, label="until it was killed")
    after = [report for report in resumed if report.step >= first_step]
    axes.plot(*_curve(after), "o-", color=GREEN, markersize=4, label="after the checkpoint")
    axes.axvline(first_step - 1, color=INK, linestyle="--", linewidth=1.4)
    last = killed[-1]
    axes.plot(last.step, last.loss, "X", color=ORANGE, markersize=13)
    place = {"transform": axes.get_xaxis_transform(), "color": INK}
    label(axes, first_step - 1, 0.03, " checkpoint", **place)
    label(axes, last.step, last.loss, "   SIGKILL", color=ORANGE, va="bottom")
    name_axes(axes, "step (optimizer updates)", "cross-entropy (nats a token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, color=INK)
    plain(axes)
    add_legend(axes, loc="upper right", fontsize=10)
    headline(figure, _finding(untouched, resumed))
    figure.subplots_adjust(left=0.065, right=0.99, top=0.89, bottom=0.13)
    return png(figure)


def _curve(reports: Sequence[StepReport]) -> tuple[list[int], list[float]]:
    return [report.step for report in reports], [report.loss for report in reports]


def _finding(untouched: Sequence[StepReport], resumed: Sequence[StepReport]) -> str:
    ours, theirs = _curve(resumed)[1], _curve(untouched)[1]
    if ours == theirs:
        return f"All {len(ours)} losses are equal to the last bit"
    differing = [report.step for report, a, b in zip(resumed, ours, theirs) if a != b]
    if not differing:
        return f"{len(ours)} steps against {len(theirs)}"
    return f"The losses differ from step {differing[0]}"
