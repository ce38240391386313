"""What preference training did: margins, accuracies, and how far the answers have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from workbench.errors import ConfigError
from workbench.live.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    add_legend,
    headline,
    name_axes,
    new_figure,
    plain,
    png,
)
from workbench.tuning.config import StepReport

STEPS = "step (optimizer updates)"


def draw_preferences(runs: Mapping[str, Sequence[StepReport]]) -> bytes:
    """A row of pictures a run: margin, share of pairs won, and shift of both sides, as PNG bytes.

    Args:
        runs: reports of runs with `objective=DPOConfig(…)`, by name.

    Raises:
        ConfigError: there is no run, or one without steps or without margins.
    """
    for name, reports in runs.items():
        if not reports or any("margin" not in (report.extras or {}) for report in reports):
            raise ConfigError(
                f"{name!r} has no margins to draw",
                cure="Give the reports of a training with objective=wb.DPOConfig(…).",
            )
    if not runs:
        raise ConfigError("no runs to draw")
    figure = new_figure(12, 0.8 + 3.1 * len(runs))
    rows = figure.subplots(len(runs), 3, squeeze=False)
    for number, (axes, (name, reports)) in enumerate(zip(rows, runs.items())):
        _draw_margin(axes[0], reports, name)
        _draw_accuracy(axes[1], reports)
        _draw_shifts(axes[2], reports)
        for each in axes:
            each.grid(alpha=0.25, color=INK)
            each.xaxis.get_major_locator().set_params(integer=True)
            plain(each)
            if number < len(runs) - 1:
                each.set_xlabel("")
    headline(figure, _finding(runs))
    figure.tight_layout()
    return png(figure)


def _draw_margin(axes: Axes, reports: Sequence[StepReport], name: str) -> None:
    _line(axes, reports, "margin", BLUE, "trained pairs")
    _line(axes, reports, "valid_margin", ORANGE, "held-out pairs", marker="o")
    axes.axhline(0, color=INK, linewidth=1)
    name_axes(axes, STEPS, "margin (β × nats)", name)
    add_legend(axes, loc="upper left")


def _draw_accuracy(axes: Axes, reports: Sequence[StepReport]) -> None:
    _line(axes, reports, "accuracy", BLUE, "trained pairs", factor=100)
    _line(axes, reports, "valid_accuracy", ORANGE, "held-out pairs", factor=100, marker="o")
    axes.axhline(50, color=INK, linewidth=1, linestyle="--")
    axes.set_ylim(0, 105)
    name_axes(axes, STEPS, "pairs with a margin above 0 (%)")
    add_legend(axes, loc="lower right")


def _draw_shifts(axes: Axes, reports: Sequence[StepReport]) -> None:
    for part, style in (("", "-"), ("valid_", "o")):
        held_out = " (held out)" if part else ""
        for side, color in (("chosen", GREEN), ("rejected", RED)):
            _line(axes, reports, f"{part}{side}_shift", color, f"{side}{held_out}", linestyle=style)
    axes.axhline(0, color=INK, linewidth=1)
    name_axes(axes, STEPS, "log π − log π_ref (nats an answer)")
    add_legend(axes, loc="lower left", fontsize=8)


def _line(
    axes: Axes,
    reports: Sequence[StepReport],
    measure: str,
    color: str,
    name: str,
    factor: float = 1.0,
    **style: str,
) -> None:
    points = [(r.step, factor * r.extras[measure]) for r in reports if measure in r.extras]
    if style.get("linestyle") == "o":
        style = {"linestyle": "", "marker": "o"}
    if points:
        axes.plot(*zip(*points), color=color, label=name, linewidth=2, **style)


def _finding(runs: Mapping[str, Sequence[StepReport]]) -> str:
    parts = []
    for name, reports in runs.items():
        last = reports[-1].extras
        part = "valid_" if "valid_margin" in last else ""
        moved = [f"{last[f'{part}{side}_shift']:+.0f}" for side in ("chosen", "rejected")]
        parts.append(f"{name}: chosen {moved[0]}, rejected {moved[1]} nats")
    pairs = "Held-out pairs" if "valid_margin" in next(iter(runs.values()))[-1].extras else "Pairs"
    return f"{pairs}, {'; '.join(parts)}"
