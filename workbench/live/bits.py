"""How a network that starts from nothing overtakes a baseline that counts, in bits a byte."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from workbench.errors import ConfigError
from workbench.evaluation.ngrams import NgramModel
from workbench.live.figures import (
    BLUE,
    INK,
    ORANGE,
    add_legend,
    headline,
    label,
    name_axes,
    new_figure,
    plain,
    png,
)
from workbench.live.scales import log_ticks, round_down, round_up, short_label

BITS = "bits a byte"


def draw_bits_per_byte(
    progress: Sequence[tuple[int, float]], ngrams: NgramModel, baseline: float
) -> bytes:
    """Held-out bits a byte while a network trains, and how the baseline's order was chosen: PNG.

    Args:
        progress: (step, bits a byte of the held-out text), by step.
        ngrams: the baseline.
        baseline: its bits a byte of the same text.

    Raises:
        ConfigError: there is nothing to draw.
    """
    if not progress:
        raise ConfigError("no bits to draw", cure="Train with validation rows and valid_every.")
    if not ngrams.tried:
        raise ConfigError("the n-grams' order was given", cure="Let fit_ngrams choose it.")
    figure = new_figure(12, 4.2)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    _draw_progress(left, progress, ngrams, baseline)
    _draw_orders(right, ngrams)
    shown = [baseline, *ngrams.tried, *(bits for _, bits in progress)]
    for axes in (left, right):
        _scale(axes, round_down(min(shown)), round_up(max(shown)))
        axes.grid(alpha=0.25, color=INK)
        plain(axes)
    step, last = progress[-1]
    headline(
        figure,
        f"After {step} steps the network needs {last:.2f} bits a byte of held-out text, "
        f"{ngrams.order}-grams {baseline:.2f}",
    )
    figure.tight_layout()
    return png(figure)


def _draw_progress(
    axes: Axes, progress: Sequence[tuple[int, float]], ngrams: NgramModel, baseline: float
) -> None:
    axes.plot(*zip(*progress), color=BLUE, linewidth=2, marker="o", label="network")
    axes.axhline(baseline, color=ORANGE, linewidth=2, linestyle="--", label=str(ngrams))
    axes.xaxis.get_major_locator().set_params(integer=True)
    name_axes(axes, "step (optimizer updates)", BITS, "held-out text")
    add_legend(axes, loc="upper right")


def _draw_orders(axes: Axes, ngrams: NgramModel) -> None:
    orders = range(1, len(ngrams.tried) + 1)
    axes.plot(orders, ngrams.tried, color=ORANGE, linewidth=2, marker="o", markersize=4)
    best = ngrams.tried[ngrams.order - 1]
    axes.plot(ngrams.order, best, color=ORANGE, marker="o", markersize=10)
    label(axes, ngrams.order, best * 1.25, f"{ngrams.order}", color=ORANGE, ha="center")
    axes.xaxis.get_major_locator().set_params(integer=True)
    name_axes(axes, "order of the n-grams (bytes)", "", "last tenth of the training text")


def _scale(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(0.95 * low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.yaxis.set_major_formatter(FuncFormatter(short_label))
    axes.yaxis.set_minor_locator(NullLocator())
