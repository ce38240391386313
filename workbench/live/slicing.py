"""Pictures of the shift, the mask, causality, positions, the KV cache, and of what checks catch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

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

TRAINED, READ, PAD = BLUE, "#b3bac2", "none"
SERIES = (GREEN, RED, ORANGE, VIOLET, YELLOW, BLUE)
FLOOR = 1e-8  # differences below are drawn here: a logarithm has no zero
LONGEST_WORD = 12  # characters of a token that are shown


def draw_shift(words: Sequence[str], loss_mask: Sequence[bool]) -> bytes:
    """What the model reads at each position, and what it is trained to say there.

    Args:
        words: T tokens as text.
        loss_mask: (T,) whether token t is a target.
    """
    count, trained = len(words) - 1, sum(map(bool, loss_mask[1:]))
    figure = new_figure(12, 2.9)
    axes = figure.subplots()
    for t in range(count):
        counts = bool(loss_mask[t + 1])
        _cell(axes, t, 1.5, words[t], READ, "black")
        _cell(axes, t, 0, words[t + 1], TRAINED if counts else PAD, "white" if counts else INK)
        arrow = {"arrowstyle": "-|>", "color": TRAINED if counts else INK, "alpha": 0.9}
        axes.annotate("", (t + 0.5, 1.04), (t + 0.5, 1.46), arrowprops=arrow)
    axes.set_xlim(0, count)
    axes.set_ylim(-0.05, 2.55)
    axes.set_yticks([0.5, 2.0], ["target t + 1", "input t"], color=INK)
    axes.set_xticks(np.arange(count) + 0.5, range(count))
    name_axes(axes, "position t (tokens)", "")
    plain(axes, keep=())
    headline(figure, f"One shift, in one place: {trained} of {count} targets are trained (blue)")
    figure.subplots_adjust(left=0.085, right=0.995, top=0.86, bottom=0.19)
    return png(figure)


def draw_masks(rows: Sequence[Sequence[str]], loss_mask: np.ndarray) -> bytes:
    """A batch as a grid: which tokens are read, which are trained, which are padding.

    Args:
        rows: for each row its own tokens as text, without padding.
        loss_mask: (B, T) whether token t is a target.
    """
    B, T = loss_mask.shape
    figure = new_figure(12, 0.8 + 1.25 * B)
    axes = figure.subplots()
    for row, words in enumerate(rows):
        for t in range(T):
            if t >= len(words):
                _cell(axes, t, B - 1 - row, "", PAD, INK)
                continue
            trained = bool(loss_mask[row, t])
            color, ink = (TRAINED, "white") if trained else (READ, "black")
            _cell(axes, t, B - 1 - row, words[t], color, ink, upright=True)
    axes.set_xlim(0, T)
    axes.set_ylim(-0.05, B)
    axes.set_xticks(np.arange(0, T, 5) + 0.5, range(0, T, 5))
    axes.set_yticks(B - 0.5 - np.arange(B), [f"row {row}" for row in range(B)], color=INK)
    name_axes(axes, "position (tokens)", "")
    plain(axes, keep=())
    read = sum(map(len, rows))
    headline(
        figure,
        f"{int(loss_mask[:, 1:].sum())} targets are trained (blue), {read} tokens are read, "
        f"{B * T - read} are padding (empty)",
    )
    figure.subplots_adjust(
        left=0.05,
        right=0.995,
        top=1 - 0.36 / figure.get_figheight(),
        bottom=0.48 / figure.get_figheight(),
    )
    return png(figure)


def _cell(
    axes: Axes, x: float, y: float, word: str, color: str, ink: str, upright: bool = False
) -> None:
    filled = color != PAD
    edge = "none" if filled else INK
    axes.add_patch(
        Rectangle(
            (x + 0.04, y + 0.02),
            0.92,
            0.96,
            facecolor=color,
            edgecolor=edge,
            linewidth=0.6,
            alpha=1.0 if filled else 0.5,
        )
    )
    shown = word.replace("\n", "↵").replace(" ", "·")
    shown = shown if len(shown) <= LONGEST_WORD else shown[: LONGEST_WORD - 1] + "…"
    label(
        axes,
        x + 0.5,
        y + 0.5,
        shown,
        color=ink,
        ha="center",
        va="center",
        fontsize=7.5,
        rotation=90 if upright or len(shown) > 5 else 0,
    )


def draw_causality(matrices: Mapping[str, np.ndarray]) -> bytes:
    """Heat maps of `causality_matrix`: which logits move when a token is changed.

    Args:
        matrices: title → (T, T), rows the changed token, columns the position of the logits.
    """
    figure = new_figure(12, 4.6)
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (title, matrix) in zip(panels, matrices.items()):
        shown = np.where(matrix > 0, np.maximum(matrix, FLOOR), np.nan)
        image = axes.imshow(shown, norm=LogNorm(FLOOR, 1), cmap="viridis")
        count = len(matrix)
        axes.set_xticks(range(count))
        axes.set_yticks(range(count))
        axes.add_line(_diagonal(count))
        name_axes(axes, "logits at position", "changed token", title)
        plain(axes)
    bar = figure.colorbar(image, ax=list(panels), pad=0.015, fraction=0.03)
    bar.set_label("logits moved (share of the largest)", color=INK)
    bar.ax.tick_params(colors=INK)
    leaks = {title: bool((np.tril(m, -1) > 1e-4).any()) for title, m in matrices.items()}
    causal = [title for title, leaking in leaks.items() if not leaking]
    headline(
        figure, f"A changed token moves nothing before it (empty: not a bit): {', '.join(causal)}"
    )
    return png(figure)


def _diagonal(count: int) -> Line2D:
    steps = np.repeat(np.arange(count + 1), 2) - 0.5
    return Line2D(steps[1:], steps[:-1], color=RED, linewidth=1.4)


def draw_positions(
    gaps: Sequence[int], gap_moves: Sequence[float], shift_moves: Sequence[float], tolerance: float
) -> bytes:
    """What a wrong offset does: a gap after the past, and a shift of everything.

    Args:
        gaps: positions.
        gap_moves: how far the logits move if only the new tokens stand that much further on.
        shift_moves: how far they move if all tokens do.
        tolerance: what counts as rounding.
    """
    figure = new_figure(12, 3.6)
    axes = figure.subplots()
    for moves, color, name in (
        (gap_moves, ORANGE, "a gap between past and new tokens"),
        (shift_moves, GREEN, "all tokens further on"),
    ):
        axes.plot(gaps, np.maximum(moves, FLOOR), "o-", color=color, linewidth=2, label=name)
    axes.axhline(tolerance, color=INK, linestyle=":", linewidth=1.2)
    label(axes, gaps[-1], tolerance * 1.3, "rounding below this line", color=INK, ha="right")
    axes.set_yscale("log")
    name_axes(axes, "positions further on (tokens)", "logits moved (share of the largest)")
    axes.grid(alpha=0.25, color=INK)
    plain(axes)
    add_legend(axes, loc="center right")
    headline(
        figure, "RoPE sees distances, not places: a gap moves the logits, a shift of all does not"
    )
    figure.subplots_adjust(left=0.075, right=0.99, top=0.89, bottom=0.15)
    return png(figure)


def draw_drift(drifts: Mapping[str, Sequence[float]], tolerance: float) -> bytes:
    """How far token-by-token logits are from those without a cache, at each position.

    Args:
        drifts: name of a cache → (T,) differences, as a share of the largest logit.
        tolerance: what counts as rounding.
    """
    figure = new_figure(12, 3.6)
    axes = figure.subplots()
    for (name, values), color in zip(drifts.items(), SERIES * len(drifts)):
        axes.plot(np.maximum(values, FLOOR), "o-", color=color, linewidth=2, label=name)
    axes.axhline(tolerance, color=INK, linestyle=":", linewidth=1.2)
    axes.set_yscale("log")
    name_axes(axes, "position (tokens)", "difference from no cache\n(share of the largest logit)")
    axes.grid(alpha=0.25, color=INK)
    plain(axes)
    add_legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    good = [name for name, values in drifts.items() if max(values) <= tolerance]
    headline(figure, f"Token by token equals no cache at all, to rounding: {', '.join(good)}")
    figure.subplots_adjust(left=0.085, right=0.84, top=0.89, bottom=0.15)
    return png(figure)


def draw_mutants(table: pd.DataFrame) -> bytes:
    """Which check caught which broken model: a dot a finding, filled where it was expected.

    Args:
        table: one row a mutant: bug, mutant, check, caught, "also under".
    """
    also = [[part for part in text.split(", ") if part] for text in table["also under"]]
    expected = list(dict.fromkeys(table["check"]))
    checks = [*expected, *sorted({c for part in also for c in part} - set(expected))]
    figure = new_figure(12, 1.7 + 0.2 * len(table))
    axes = figure.subplots()
    bugs = list(dict.fromkeys(table["bug"]))
    for y, (_, row) in enumerate(table.iterrows()):
        color = SERIES[bugs.index(row["bug"]) % len(SERIES)]
        face = color if row["caught"] else "none"
        others = [checks.index(name) for name in also[y]]
        axes.scatter(others, [y] * len(others), s=30, facecolor="none", edgecolor=INK)
        axes.scatter(checks.index(row["check"]), y, s=70, facecolor=face, edgecolor=color)
        label(axes, len(checks) - 0.2, y, row["bug"], color=color, va="center", fontsize=8)
    axes.set_yticks(range(len(table)), table["mutant"], fontsize=8)
    axes.set_xticks(range(len(checks)), checks, rotation=40, ha="left", fontsize=9)
    literal_ticks(axes)
    axes.xaxis.tick_top()
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlim(-0.6, len(checks) - 0.4)
    axes.grid(alpha=0.25, color=INK)
    axes.set_axisbelow(True)
    plain(axes, keep=())
    caught = int(table["caught"].sum())
    headline(
        figure,
        f"{caught} of {len(table)} broken models are caught, each under its heading (filled)",
    )
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.235, right=0.835, top=1 - 1.45 / height, bottom=0.12 / height)
    return png(figure)
