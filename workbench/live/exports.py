"""What rounding does to an exported model, beside what its adapter does, as a figure."""

from __future__ import annotations

from collections.abc import Mapping

from workbench.errors import ConfigError
from workbench.export.drift import LARGEST_NOISE, Drift
from workbench.live.figures import (
    BLUE,
    INK,
    ORANGE,
    headline,
    label,
    name_axes,
    new_figure,
    plain,
    png,
)

ROOM = 8  # factor on the axis to the left of the shortest bar, and to the right of the longest
TEXT_WIDTH = 100  # factor on the axis that a bar's text takes


def draw_drift(drifts: Mapping[str, Drift]) -> bytes:
    """One bar an export: how far rounding moves the logits, on a logarithmic axis, as PNG bytes.

    The line is what the adapter moves them. Orange exports lose it or drown it. The ground is
    transparent.

    Args:
        drifts: by the export's name, all of one model with one adapter.

    Raises:
        ConfigError: there is none, or one without an adapter that moves the logits.
    """
    if not drifts or any(drift.lost is None for drift in drifts.values()):
        raise ConfigError(
            "there is no adapter's move to compare rounding with",
            cure="Give the drift of exports that wb.fuse quantised, made with a trained adapter.",
        )
    adapter = next(iter(drifts.values())).adapter
    figure = new_figure(12, 1.6 + 0.6 * len(drifts))
    axes = figure.subplots()
    for place, drift in enumerate(drifts.values()):
        at, color = len(drifts) - 1 - place, ORANGE if drift.swallows else BLUE
        axes.barh(at, drift.rounding, height=0.55, color=color)
        lost = f"{drift.rounding:.2g}; {100 * max(drift.lost, 0):.0f} % of the adapter lost"
        is_clear = drift.rounding < adapter / TEXT_WIDTH  # of the adapter's line
        end = drift.rounding if is_clear else max(drift.rounding, adapter)
        label(axes, end * 1.08, at, lost, va="center", color=INK)
    axes.axvline(adapter, color=INK, linewidth=1.5, linestyle="--")
    axes.set_yticks(range(len(drifts) - 1, -1, -1), list(drifts), color=INK, fontsize=10)
    for name in axes.get_yticklabels():
        name.set_parse_math(False)
    axes.set_xscale("log")
    smallest = min(adapter, *(drift.rounding for drift in drifts.values()))
    axes.set_xlim(smallest / ROOM, axes.get_xlim()[1] * ROOM)
    text = f"move of the logits (root mean square, logarithmic; dashed: the adapter, {adapter:.2g})"
    name_axes(axes, text, "")
    plain(axes, keep=("bottom",))
    headline(figure, _finding(drifts, adapter))
    figure.tight_layout()
    return png(figure)


def _finding(drifts: Mapping[str, Drift], adapter: float) -> str:
    kept = [name for name, drift in drifts.items() if not drift.swallows]
    refused = [name for name, drift in drifts.items() if drift.swallows]
    text = f"The adapter is kept by {', '.join(kept) or 'none'}"
    if not refused:
        return text
    worst = max(drifts[name].rounding for name in refused) / adapter
    others = ", ".join(refused)
    return f"{text}; {others}: rounding moves {worst:.0f} × as far (bound {LARGEST_NOISE:g})"
