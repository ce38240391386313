"""Pictures of memory: phases, loops, a leak, a guard at work, planned against measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workbench.errors import ConfigError
from workbench.live.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    VIOLET,
    YELLOW,
    add_legend,
    headline,
    label,
    literal_ticks,
    name_axes,
    new_figure,
    plain,
    png,
)
from workbench.probes.guard import WARNING_SHARE
from workbench.probes.leaks import LeakReport
from workbench.probes.memory import PhaseReading

SERIES = (GREEN, RED, VIOLET, ORANGE, BLUE, YELLOW, INK)
MEGA, GIGA = 1e6, 1e9
BANDS = (0.05, 0.15)  # of the measured peak


def draw_phases(phases: Sequence[PhaseReading]) -> bytes:
    """Memory of one phase after the other, as PNG bytes.

    A bar a phase: what was in use before it, and above that what it needed at its highest; a line
    marks what was left in use.

    Raises:
        ConfigError: no phase.
    """
    _require(phases, "phase")
    figure = new_figure(12, 0.62 * len(phases) + 1.5)
    axes = figure.subplots()
    names = [f"{phase.name}  ({phase.seconds:.2f} s)" for phase in phases]
    before = np.array([phase.before.active_bytes for phase in phases]) / MEGA
    peaks = np.array([phase.peak_bytes for phase in phases]) / MEGA
    after = [phase.after.active_bytes / MEGA for phase in phases]
    places = np.arange(len(phases))
    axes.barh(places, before, 0.6, color=GREEN, label="in use before")
    axes.barh(places, peaks - before, 0.6, before, color=VIOLET, label="and at the peak")
    axes.vlines(after, places - 0.42, places + 0.42, color=INK, linewidth=2.5, label="left after")
    for place, peak in zip(places, peaks):
        label(axes, peak, place, f" {peak:.0f} MB", color=INK, va="center")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * peaks.max())
    literal_ticks(axes)
    name_axes(axes, "arrays in use (MB)", "")
    add_legend(axes, loc="lower center", ncols=3, bbox_to_anchor=(0.4, 1.0), fontsize=10)
    _finish(axes)
    worst = phases[int(peaks.argmax())]
    headline(figure, f"The peak is in: {worst.name}")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return png(figure)


def draw_loops(loops: Mapping[str, pd.DataFrame]) -> bytes:
    """What several loops hold, step by step above their start, as PNG bytes.

    Args:
        loops: title → a row a step: active_bytes and process_bytes.

    Raises:
        ConfigError: no loop, or one without a step.
    """
    _require(loops, "loop")
    for table in loops.values():
        _require(table, "step")
    figure = new_figure(12, 4.2)
    for axes, (column, title) in zip(
        figure.subplots(1, 2),
        {"active_bytes": "What MLX counts", "process_bytes": "What the process holds"}.items(),
    ):
        for (name, table), color in zip(loops.items(), SERIES):
            rise = (table[column] - table[column].iloc[0]) / MEGA
            steps = np.arange(1, len(table) + 1)
            axes.plot(steps, rise, "o-", color=color, linewidth=2.2, markersize=4, label=name)
        name_axes(axes, "step (updates)", "above the first step (MB)", title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _finish(axes)
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="lower center",
        ncols=len(loops),
        frameon=False,
        labelcolor=INK,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    headline(figure, _unseen(loops))
    figure.subplots_adjust(left=0.065, right=0.99, top=0.83, bottom=0.24, wspace=0.16)
    return png(figure)


def _unseen(loops: Mapping[str, pd.DataFrame]) -> str:
    """The finding: the loop whose process grows most beyond what MLX counts."""
    rises = {name: (table.iloc[-1] - table.iloc[0]) / MEGA for name, table in loops.items()}
    worst = max(rises, key=lambda name: rises[name].process_bytes - rises[name].active_bytes)
    held, counted = rises[worst].process_bytes, rises[worst].active_bytes
    steps = len(loops[worst])
    return f"{worst}: after {steps} steps {held:.0f} MB more in the process, {counted:.0f} for MLX"


def draw_leak(curves: Mapping[str, Sequence[float]], reports: Mapping[str, LeakReport]) -> bytes:
    """Readings step by step with the fitted line and its interval, as PNG bytes.

    Args:
        curves: title → bytes, one reading a step.
        reports: title → what `find_leak` said of that curve.

    Raises:
        ConfigError: no curve, or one without a report.
    """
    _require(curves, "curve")
    if set(curves) - set(reports):
        raise ConfigError(f"no report for {sorted(set(curves) - set(reports))}")
    figure = new_figure(12, 4.2)
    axes = figure.subplots()
    for (title, values), color in zip(curves.items(), SERIES):
        _draw_curve(axes, title, np.asarray(values) / MEGA, reports[title], color)
    name_axes(axes, "step (updates)", "arrays in use (MB)")
    add_legend(axes, loc="upper left", fontsize=10)
    axes.margins(y=0.25)
    _finish(axes)
    leaking = [title for title in curves if reports[title].verdict == "leaking"]
    headline(figure, f"Leaking: {', '.join(leaking) or 'none'}")
    figure.subplots_adjust(left=0.065, right=0.99, top=0.89, bottom=0.13)
    return png(figure)


def _draw_curve(axes: Axes, title: str, values: np.ndarray, report: LeakReport, color: str) -> None:
    """Readings (MB) as dots; after the warm-up, the fitted line and its interval."""
    steps, fitted = np.arange(1, len(values) + 1), np.arange(report.num_steps)
    axes.plot(steps, values, "o", color=color, markersize=4, alpha=0.8)
    at, middle = steps[-report.num_steps :], (report.num_steps - 1) / 2
    level = report.baseline_bytes + report.slope * middle
    line, low, high = (
        (level + slope * (fitted - middle)) / MEGA
        for slope in (report.slope, report.low, report.high)
    )
    axes.plot(at, line, color=color, linewidth=2.4, label=f"{title}: {report}")
    axes.fill_between(at, low, high, color=color, alpha=0.2)
    axes.axvline(at[0] - 0.5, color=INK, linestyle=":", linewidth=1.2)
    place = {"transform": axes.get_xaxis_transform(), "ha": "right", "color": INK}
    label(axes, at[0] - 0.7, 0.03, "warm-up", **place)


def draw_guard(process_bytes: Sequence[int], limit_bytes: int, events: Mapping[int, str]) -> bytes:
    """A run under a memory guard: the process's memory and the two limits, as PNG bytes.

    Args:
        process_bytes: one reading a step.
        limit_bytes: at which the run is stopped; the warning comes at a share of it.
        events: step (from 1) → what happened there.

    Raises:
        ConfigError: no step, or an event at a step that is not there.
    """
    _require(process_bytes, "step")
    outside = [step for step in events if not 1 <= step <= len(process_bytes)]
    if outside:
        raise ConfigError(f"no step {outside[0]}: there are {len(process_bytes)}")
    figure = new_figure(12, 4.2)
    axes = figure.subplots()
    held = np.asarray(process_bytes) / GIGA
    axes.plot(np.arange(1, len(held) + 1), held, "o-", color=RED, linewidth=2.2, markersize=4)
    for share, text in (
        (1.0, "stop, with a\ncheckpoint"),
        (WARNING_SHARE, "tight: warn,\nrelease"),
    ):
        axes.axhline(share * limit_bytes / GIGA, color=INK, linestyle="--", linewidth=1.4)
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "color": INK}
        label(axes, 1.01, share * limit_bytes / GIGA, text, **place)
    for step, text in events.items():
        _mark(axes, step, held[step - 1], text, at_end=step > 0.8 * len(held))
    top, bottom = 1.12 * limit_bytes / GIGA, min(held.min(), 0.75 * limit_bytes / GIGA) * 0.9
    axes.set_ylim(bottom, top)
    axes.margins(x=0.03)
    name_axes(axes, "step (updates)", "the process holds (GB)")
    _finish(axes)
    headline(figure, "; ".join(events.values()) or f"{len(held)} steps below the limits")
    figure.subplots_adjust(left=0.065, right=0.89, top=0.89, bottom=0.13)
    return png(figure)


def _mark(axes: Axes, step: int, height: float, text: str, at_end: bool) -> None:
    """A ring around a point, and what happened there above it."""
    axes.plot(step, height, "o", color=ORANGE, markersize=11, markerfacecolor="none")
    style = {"textcoords": "offset points", "color": ORANGE, "parse_math": False}
    axes.annotate(text, (step, height), (0, 12), ha="right" if at_end else "center", **style)


def draw_planned(table: pd.DataFrame) -> bytes:
    """Planned against measured peaks, as PNG bytes.

    Args:
        table: a row a configuration: its text, which begins with the model's name, planned_mb and
            measured_mb.

    Raises:
        ConfigError: no configuration.
    """
    _require(table, "configuration")
    figure = new_figure(12, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    errors = table.planned_mb / table.measured_mb - 1
    span = np.array([table.measured_mb.min() * 0.8, table.measured_mb.max() * 1.25])
    for band, alpha in zip(BANDS, (0.22, 0.12)):
        left.fill_between(span, span * (1 - band), span * (1 + band), color=INK, alpha=alpha, lw=0)
        right.axhspan(-100 * band, 100 * band, color=INK, alpha=alpha, lw=0)
    order = pd.Series(np.arange(1, len(table) + 1), index=table.index)
    models = table.configuration.str.split().str[0]
    for (name, rows), color in zip(table.groupby(models, sort=False), cycle(SERIES)):
        style = {"linestyle": "none", "marker": "o", "color": color, "alpha": 0.85, "label": name}
        left.plot(rows.measured_mb, rows.planned_mb, **style)
        right.plot(order[rows.index], 100 * errors[rows.index], **style)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlim(*span)
    name_axes(left, "measured peak (MB)", "planned peak (MB)")
    name_axes(right, "configuration", "planned above measured (%)")
    right.set_ylim(-20, 20)
    add_legend(left, loc="upper left", fontsize=10)
    for axes in (left, right):
        _finish(axes)
    headline(figure, planned_error(table))
    figure.subplots_adjust(left=0.065, right=0.99, top=0.89, bottom=0.13, wspace=0.15)
    return png(figure)


def planned_error(table: pd.DataFrame) -> str:
    """How far the planned peaks are from the measured ones, in words."""
    off = (table.planned_mb / table.measured_mb - 1).abs()
    return (
        f"{len(table)} configurations: planned {off.median():.1%} off in the median, "
        f"{off.max():.1%} at worst"
    )


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25, color=INK)
    axes.set_axisbelow(True)
    plain(axes)


def _require(items, what: str) -> None:
    if not len(items):
        raise ConfigError(f"no {what} to draw", cure=f"Record at least one {what}.")
