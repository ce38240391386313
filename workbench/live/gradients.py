"""Pictures of gradients: who gets one, whether it is the slope, and what waits after an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from mlx.utils import tree_flatten

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
from workbench.models.inspection import split_name

SERIES = (GREEN, RED, ORANGE, VIOLET, BLUE, YELLOW)
FROZEN, ZERO = "#9aa3ad40", ORANGE
SINGLE_WIDTH, GAP = 2.4, 0.7  # of a column outside the layers; between blocks (columns)
MEGA = 1e6
SMALLEST = 1e-3  # percent that is drawn: a logarithm has no zero


@dataclass(frozen=True)
class Places:
    """Where a panel's modules are drawn."""

    columns: dict[str, tuple[float, float]]  # block → left edge, width
    rows: dict[str, int]  # module of a layer → row, from the top
    right: float  # edge of the last column


def gradient_norms(model: nn.Module, gradients: Mapping[str, mx.array]) -> pd.Series:
    """Norms of gradients by the names of all parameters; NaN for those that have no gradient."""
    norms = {name: mx.linalg.norm(array).item() for name, array in gradients.items()}
    return pd.Series(norms).reindex([name for name, _ in tree_flatten(model.parameters())])


def draw_gradients(panels: Mapping[str, pd.Series]) -> bytes:
    """Who gets gradient: a heat map layer × module of gradient norms a panel, as PNG bytes.

    A module is cut into as many stripes as it has tensors that get a gradient, in their order.

    Args:
        panels: title → `gradient_norms`; NaN is frozen.

    Raises:
        ConfigError: no panel, or none with a gradient other than zero.
    """
    norms = pd.concat(panels.values()).to_numpy(float) if panels else np.zeros(0)
    norms = norms[norms > 0]
    if not len(norms):
        raise ConfigError("no gradient to draw", cure="Give the norms of at least one gradient.")
    down = -(-len(panels) // 2)
    figure = new_figure(12, 1.1 + 2.75 * down)
    figure.subplots_adjust(
        left=0.122, right=0.925, wspace=0.05, hspace=0.28, **_margins(figure, 0.72, 0.75)
    )
    grid = figure.subplots(down, 2, squeeze=False)
    colors = ScalarMappable(LogNorm(norms.min(), norms.max()), matplotlib.colormaps["viridis"])
    for at, axes in enumerate(grid.flat):
        axes.set_visible(at < len(panels))
    for at, (axes, (title, series)) in enumerate(zip(grid.flat, panels.items())):
        _draw_panel(axes, title, series, colors, names_rows=at % 2 == 0)
    bar = figure.colorbar(colors, ax=list(grid.flat), pad=0.015, fraction=0.02)
    bar.set_label("norm of a tensor's gradient", color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
    keys = [Patch(color=FROZEN, label="frozen: no gradient"), Patch(color=ZERO, label="exactly 0")]
    figure.legend(handles=keys, loc="lower left", ncols=2, frameon=False, labelcolor=INK)
    counts = [f"{int((series > 0).sum())}" for series in panels.values()]
    headline(figure, f"Freezing decides: gradient reaches {', then '.join(counts)} tensors")
    return png(figure)


def _draw_panel(
    axes: Axes, title: str, norms: pd.Series, colors: ScalarMappable, names_rows: bool
) -> None:
    cells = _cells(norms)
    places = _places(cells)
    height = max(1, len(places.rows))
    for (block, module), values in cells.items():
        left, width = places.columns[block]
        top, tall = (places.rows[module], 1) if module in places.rows else (0, height)
        shares = values.dropna().to_numpy() if values.notna().any() else np.array([np.nan])
        for stripe, value in enumerate(shares):
            size = tall / len(shares)
            corner = (left, top + stripe * size)
            face = _face(value, colors)
            high = size - 0.1 * min(1.0, size)
            axes.add_patch(Rectangle(corner, width - 0.1, high, facecolor=face, linewidth=0))
        if module not in places.rows:
            style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 9}
            middle = (left + width / 2 - 0.05, height / 2)
            label(axes, *middle, module, color=_ink_on(face), **style)
    axes.set_xlim(-0.2, places.right)
    axes.set_ylim(height, -0.1)
    _name_places(axes, places, names_rows)
    got, zero = int(norms.notna().sum()), int((norms == 0).sum())
    note = f", {zero} exactly 0" if zero else ""
    axes.set_title(f"{title}: {got} of {len(norms)} tensors{note}", **_title_style())


def _title_style() -> dict[str, object]:
    return {"color": INK, "fontsize": 11, "loc": "left", "parse_math": False}


def _face(value: float, colors: ScalarMappable) -> str | tuple[float, ...]:
    if np.isnan(value):
        return FROZEN
    return tuple(np.ravel(colors.to_rgba(value))) if value > 0 else ZERO


def _ink_on(face: str | tuple[float, ...]) -> str:
    if face == FROZEN:
        return INK
    return "black" if np.dot(to_rgb(face), (0.299, 0.587, 0.114)) > 0.5 else "white"


def _cells(norms: pd.Series) -> dict[tuple[str, str], pd.Series]:
    """Norms of each (block, module); what an adapter wraps belongs to the module it adapts."""
    split = [split_name(name) for name in norms.index]
    keys = [(block, module.removesuffix(".linear")) for block, module in split]
    found: dict[tuple[str, str], list[str]] = {}
    for key, name in zip(keys, norms.index):
        found.setdefault(key, []).append(name)
    return {key: norms[names] for key, names in found.items()}


def _places(cells: Mapping[tuple[str, str], pd.Series]) -> Places:
    columns, rows, left = {}, {}, 0.0
    previous = ""
    for block, module in cells:
        in_layer = block.startswith("layer ")
        if block not in columns:
            together = in_layer and previous.startswith("layer ")
            left += GAP if columns and not together else 0.0
            width = 1.0 if in_layer else SINGLE_WIDTH
            columns[block] = (left, width)
            left, previous = left + width, block
        if in_layer:
            rows.setdefault(module, len(rows))
    return Places(columns, rows, left)


def _name_places(axes: Axes, places: Places, names_rows: bool) -> None:
    layers = [block for block in places.columns if block.startswith("layer ")]
    shown = layers[:: max(1, -(-len(layers) // 8))]
    middles = [places.columns[block][0] + 0.45 for block in shown]
    axes.set_xticks(middles, [block.removeprefix("layer ") for block in shown])
    axes.set_xlabel("layer", color=INK, labelpad=1)
    shorts = [module.rpartition(".")[2] for module in places.rows]
    names = shorts if len(set(shorts)) == len(shorts) else list(places.rows)
    names = [name.replace("post_attention_", "post_attn_") for name in names]
    axes.set_yticks(np.arange(len(names)) + 0.45, names if names_rows else [""] * len(names))
    literal_ticks(axes)
    plain(axes, keep=())
    axes.tick_params(axis="y", length=0, labelsize=9)


def _margins(figure: Figure, top: float, bottom: float) -> dict[str, float]:
    """Margins in inches, as `subplots_adjust` takes them."""
    height = figure.get_figheight()
    return {"top": 1 - top / height, "bottom": bottom / height}


def draw_slopes(
    measured: Sequence[float], claims: Mapping[str, Sequence[float]], tolerance: float = 0.02
) -> bytes:
    """Slopes that gradients claim against slopes by finite differences, as PNG bytes.

    Args:
        measured: central differences, a number a place in parameter space.
        claims: title → what a gradient says there, in the same order.
        tolerance: relative difference that counts as agreement.

    Raises:
        ConfigError: no slopes, or claims of another number.
    """
    measured = np.asarray(measured, dtype=float)
    if not len(measured) or not claims or any(len(c) != len(measured) for c in claims.values()):
        raise ConfigError("no slopes to draw", cure="Give every claim as many as were measured.")
    figure = new_figure(12, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
    dashed = {"color": INK, "linewidth": 1.2, "linestyle": "--"}
    left.axline((measured[0], measured[0]), slope=1, **dashed)
    order, findings = np.argsort(np.abs(measured))[::-1], []
    for (title, claim), color, marker in zip(claims.items(), cycle(SERIES), cycle("osD^vP")):
        errors = slope_errors(measured, claim)
        style = {"color": color, "marker": marker, "markersize": 6, "linestyle": "none"}
        left.plot(measured, claim, label=title, alpha=0.85, **style)
        right.plot(np.maximum(100 * errors[order], SMALLEST), **style)
        agreeing = int((errors <= tolerance).sum())
        findings.append(f"{title}: {agreeing} of {len(errors)} slopes agree")
    right.axhline(100 * tolerance, **dashed)
    label(right, 0, 120 * tolerance, f"allowed: {100 * tolerance:g} %", color=INK, fontsize=9)
    right.set_yscale("log")
    right.xaxis.get_major_locator().set_params(integer=True)
    name_axes(left, "slope by differences (nats a unit)", "slope by the gradient (nats a unit)")
    name_axes(right, "entry, from the steepest to the flattest", "difference (% of the slope)")
    add_legend(left, loc="best", fontsize=10)
    _grid(left, right)
    headline(figure, "; ".join(findings))
    figure.subplots_adjust(left=0.075, right=0.99, top=0.89, bottom=0.12, wspace=0.17)
    return png(figure)


def _grid(*panels: Axes) -> None:
    for axes in panels:
        axes.grid(alpha=0.25, color=INK)
        plain(axes)


def slope_errors(measured: Sequence[float], claimed: Sequence[float]) -> np.ndarray:
    """Differences of two lists of slopes, each as a share of the larger of the two."""
    measured, claimed = np.asarray(measured, float), np.asarray(claimed, float)
    larger = np.maximum(np.abs(measured), np.abs(claimed))
    return np.abs(measured - claimed) / np.where(larger > 0, larger, 1.0)


def draw_pending(loops: Mapping[str, pd.DataFrame]) -> bytes:
    """Operations left unevaluated and memory in use, step by step, as PNG bytes.

    Args:
        loops: title → a row a step: pending (operations), active_bytes and, in the last row,
            final_bytes (the peak when all that waits is evaluated at last), both above the start.

    Raises:
        ConfigError: no loop, or one without a step.
    """
    if not loops or not all(len(table) for table in loops.values()):
        raise ConfigError("no steps to draw", cure="Record at least one step of each loop.")
    figure = new_figure(12, 4.4)
    left, right = figure.subplots(1, 2)
    for at, ((title, table), color) in enumerate(zip(loops.items(), cycle(SERIES))):
        steps, active = np.arange(1, len(table) + 1), table["active_bytes"] / MEGA
        style = {"color": color, "linewidth": 2.2, "label": title, "zorder": 3 - 0.1 * at}
        left.plot(steps, table["pending"], **style)
        right.plot(steps, active, **style)
        if table["pending"].iloc[-1]:
            ends = [active.iloc[-1], table["final_bytes"].iloc[-1] / MEGA]
            style = {"color": color, "linestyle": ":", "marker": "*", "markersize": 12}
            right.plot([steps[-1]] * 2, ends, markevery=[1], clip_on=False, **style)
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=-0.15)
    right.set_ylim(bottom=0)
    name_axes(left, "step (updates)", "operations that wait")
    name_axes(right, "step (updates)", "active memory above the start (MB)")
    stars = Line2D([], [], color=INK, marker="*", linestyle=":", markersize=12)
    right.legend([stars], ["peak when it is evaluated at last"], frameon=False, labelcolor=INK)
    _grid(left, right)
    style = {"loc": "lower center", "ncols": len(loops), "frameon": False, "labelcolor": INK}
    for text in figure.legend(*left.get_legend_handles_labels(), **style).get_texts():
        text.set_parse_math(False)
    headline(figure, _growth(loops))
    figure.subplots_adjust(left=0.07, right=0.99, top=0.89, bottom=0.22, wspace=0.15)
    return png(figure)


def _growth(loops: Mapping[str, pd.DataFrame]) -> str:
    """The finding: what waits after the last step of each loop."""
    counts = {title: int(table["pending"].iloc[-1]) for title, table in loops.items()}
    worst, best = max(counts, key=counts.get), min(counts, key=counts.get)
    waiting = f"{counts[worst]:,} operations wait ({worst})"
    return f"After {len(loops[worst])} steps, {waiting}, or {counts[best]:,} ({best})"
