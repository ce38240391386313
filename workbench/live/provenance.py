"""What a provenance loss is made of, what it reaches, and what a weighted training changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm

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
from workbench.tuning.config import StepReport
from workbench.tuning.provenance import EPSILON, squared_distances
from workbench.tuning.terms import CROSS_ENTROPY

STEPS = "step (optimizer updates)"
COLORS = (ORANGE, BLUE, GREEN, VIOLET, YELLOW, RED)
GRID = 200  # places along each axis of the surface
COLUMNS = ("group", "authority_weight", "provenance_entropy", "row_weight")


def draw_surface(documents: pd.DataFrame, alpha: float = 2.7) -> bytes:
    """L = α d² over authority and entropy, with the documents on it, as PNG bytes.

    Args:
        documents: a row each: `group`, `authority_weight` (w), `provenance_entropy` (H, bits).
        alpha: of the loss.

    Raises:
        ConfigError: a column is missing, or there are no documents.
    """
    _require(documents, COLUMNS[:3])
    figure = new_figure(9, 4.6)
    axes = figure.add_subplot()
    highest = max(4.0, 1.12 * documents.provenance_entropy.max())
    w, entropy = np.meshgrid(np.linspace(0, 0.99, GRID), np.linspace(0, highest, GRID))
    losses = alpha * squared_distances(w, entropy)
    norm = PowerNorm(0.5, 0, losses.max())
    axes.pcolormesh(w, entropy, losses, norm=norm, cmap="cividis", alpha=0.75, rasterized=True)
    line = np.linspace(0, 0.99, GRID)
    axes.plot(line, -np.log(1 - line + EPSILON), color=RED, linewidth=2, label="L = 0")
    for color, (name, part) in zip(_colors(documents), documents.groupby("group", sort=False)):
        place = part.authority_weight, part.provenance_entropy
        axes.scatter(*place, s=46, color=color, edgecolors="white", linewidths=1, label=name)
    axes.set(xlim=(-0.01, 1.0), ylim=(-0.02 * highest, highest))
    name_axes(axes, "authority weight w", "provenance entropy H (bits)")
    bar = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes, alpha=0.75)
    bar.set_label(f"L = {alpha:g} · d²", color=INK)
    plain(bar.ax, keep=())
    plain(axes)
    add_legend(axes, loc="upper left", bbox_to_anchor=(1.2, 1))
    headline(figure, "L is nought along H = −ln(1 − w), and grows to both sides of it")
    figure.tight_layout()
    return png(figure)


def draw_terms(reports: Sequence[StepReport]) -> bytes:
    """The terms of an additive loss by step, and the norm of each one's gradient, as PNG bytes.

    Raises:
        ConfigError: the reports are not of such a run.
    """
    needed = {CROSS_ENTROPY, "provenance", "total", "provenance_grad_norm"}
    if not reports or any(needed - set(report.extras or {}) for report in reports):
        cure = "Give the reports of a run with objective=wb.ProvenanceConfig('additive')."
        raise ConfigError("these reports have no provenance term to draw", cure=cure)
    steps = [report.step for report in reports]
    extras = pd.DataFrame([report.extras for report in reports])
    figure = new_figure(12, 3.9)
    values, norms = figure.subplots(1, 2)
    for name, color in (("total", INK), ("provenance", RED), (CROSS_ENTROPY, BLUE)):
        values.plot(steps, extras[name], color=color, linewidth=2, label=name.replace("_", "-"))
    name_axes(values, STEPS, "value (nats a token)", "what is reported")
    for name, color in ((CROSS_ENTROPY, BLUE), ("provenance", RED)):
        norm = extras[f"{name}_grad_norm"]
        norms.plot(steps, norm, color=color, linewidth=2, marker="o", label=name.replace("_", "-"))
    name_axes(norms, STEPS, "norm of the term's gradient", "what reaches the parameters")
    for axes, place in ((values, "lower left"), (norms, "upper left")):
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
        axes.grid(alpha=0.25, color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes)
        add_legend(axes, loc=place)
    added, reached = extras["provenance"].mean(), extras["provenance_grad_norm"].max()
    headline(figure, f"The term adds {added:.1f} to the loss, and {reached:g} to the gradient")
    figure.tight_layout()
    return png(figure)


def draw_weighting(documents: pd.DataFrame, losses: Mapping[str, Mapping[str, float]]) -> bytes:
    """The weight of each document, and the loss of each group after trainings, as PNG bytes.

    Args:
        documents: a row each: `group`, `row_weight` (mean 1), w and H as for `draw_surface`.
        losses: mean cross-entropy (nats a token) by group: before, and after two trainings or
            more from there, by their names.

    Raises:
        ConfigError: a column is missing, or there is nothing to compare.
    """
    _require(documents, COLUMNS)
    groups = list(dict.fromkeys(documents.group))
    if len(losses) < 3 or any(set(groups) - set(of) for of in losses.values()):
        raise ConfigError("a start and two trainings are compared, each by every group")
    figure = new_figure(12, 4.2)
    weights, bars = figure.subplots(1, 2)
    _draw_weights(weights, documents)
    _draw_losses(bars, losses, groups)
    mean = documents.groupby("group", sort=False).row_weight.mean()
    most, least = mean.idxmax(), mean.idxmin()
    names = list(losses)
    moved = {g: losses[names[-1]][g] - losses[names[-2]][g] for g in (most, least)}
    found = f"{most} ({moved[most]:+.2f} nats) over {least} ({moved[least]:+.2f})"
    headline(figure, f"{names[-1].capitalize()} against {names[-2]}: {found}")
    figure.tight_layout()
    return png(figure)


def _draw_weights(axes: Axes, documents: pd.DataFrame) -> None:
    ordered = documents.reset_index(drop=True)
    groups = ordered.groupby("group", sort=False)
    for number, (color, (_, part)) in enumerate(zip(_colors(ordered), groups)):
        places = number + np.linspace(-0.28, 0.28, len(part)) * (len(part) > 1)
        axes.scatter(places, sorted(part.row_weight), s=34, color=color, alpha=0.85)
        mean = part.row_weight.mean()
        axes.hlines(mean, number - 0.36, number + 0.36, color=color, linewidth=2)
        label(axes, number + 0.4, mean, f"{mean:.2f}", color=INK, va="center", fontsize=9)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xticks(range(groups.ngroups), list(groups.groups))
    axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
    name_axes(axes, "", "times that its cross-entropy counts", "weight of each document")
    literal_ticks(axes)
    plain(axes)


def _draw_losses(
    axes: Axes, losses: Mapping[str, Mapping[str, float]], groups: Sequence[str]
) -> None:
    (_, start), *trainings = losses.items()
    width = 0.8 / len(trainings)
    for number, (name, of) in enumerate(trainings):
        places = np.arange(len(groups)) + (number - (len(trainings) - 1) / 2) * width
        heights = [of[group] - start[group] for group in groups]
        color = (BLUE, ORANGE, GREEN, VIOLET)[number % 4]
        axes.bar(places, heights, 0.92 * width, color=color, label=name)
        for place, height in zip(places, heights):
            side = "bottom" if height >= 0 else "top"
            style = {"ha": "center", "va": side, "color": INK, "fontsize": 8.5}
            label(axes, place, height, f"{height:+.3f}", **style)
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xticks(range(len(groups)), groups)
    name_axes(axes, "", "change of the cross-entropy (nats a token)", "what each training did")
    axes.margins(y=0.2)
    add_legend(axes, loc="lower left", ncols=len(trainings))
    literal_ticks(axes)
    plain(axes)


def _colors(documents: pd.DataFrame) -> list[str]:
    count = documents.group.nunique()
    return [COLORS[number % len(COLORS)] for number in range(count)]


def _require(documents: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in documents]
    if missing or documents.empty:
        raise ConfigError(f"documents to draw need {', '.join(missing) or 'a row'}")
