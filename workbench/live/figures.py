"""What all our pictures share: an Agg figure, ink for light and dark grounds, PNG bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#7d8590"  # reads on a light and on a dark ground
BLUE, ORANGE, GREEN = "#2f6fde", "#e8743b", "#2a9d8f"
RED, VIOLET, YELLOW = "#e05260", "#8a63d2", "#d9a520"
DOTS = 110  # an inch


def new_figure(width: float, height: float) -> Figure:
    """A figure (inches) that needs no display and no pyplot."""
    figure = Figure(figsize=(width, height), dpi=DOTS)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes on a transparent ground."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def headline(figure: Figure, text: str, left: float = 0.01) -> None:
    """The finding, above the whole figure, in as many lines as it needs."""
    title = figure.suptitle(text, x=left, ha="left", color=INK, fontsize=13, fontweight="bold")
    title.set_parse_math(False)  # a dollar sign would begin a formula
    room = (1 - 2 * left) * figure.bbox.width
    width = title.get_window_extent().width
    if width > room:
        title.set_text(textwrap.fill(text, int(len(text) * room / width)))


def label(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    """Text at a place in the axes' units; never read as a formula."""
    axes.text(x, y, text, **{"fontsize": 10, "parse_math": False, **style})


def plain(axes: Axes, keep: Sequence[str] = ("left", "bottom")) -> None:
    """Ticks and the kept spines in ink, the other spines away."""
    axes.tick_params(which="both", colors=INK, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(INK)


def name_axes(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Axis names with their units, and a title, in ink."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, color=INK, fontsize=11, loc="left").set_parse_math(False)


def add_legend(axes: Axes, **style: object) -> None:
    """A legend without a frame, in ink."""
    legend = axes.legend(**{"frameon": False, "labelcolor": INK, "fontsize": 9, **style})
    for text in legend.get_texts():
        text.set_parse_math(False)


def literal_ticks(axes: Axes) -> None:
    """Names on the axes as they are: a dollar sign begins no formula."""
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_parse_math(False)
