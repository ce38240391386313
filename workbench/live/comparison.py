"""Many runs on one picture: their curves over one another, and two settings as a heat map."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator

from workbench.errors import ConfigError, RunError
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
from workbench.live.history import History, thinned
from workbench.live.runs import read_reports
from workbench.live.scales import short_label
from workbench.runs.records import PARAMETER
from workbench.runs.table import as_table, column_of, compare_configs

COLORS = (BLUE, ORANGE, GREEN, VIOLET, YELLOW, RED)
SHADES = "viridis"  # of more curves than colours, from the highest end to the lowest
DARKEST, LIGHTEST = 0.25, 0.9  # of those shades: both ends must read on both grounds
MAX_CURVES, MAX_CELLS, MAX_LABELS = 48, 30, 4
FAR = 20  # times the top of the usual curve
MARGIN = 0.05  # of an axis that is cut, as matplotlib has it
LABEL, OWN = 60, 12  # characters; of them for a run's own name, at least
CURVES = {  # y → column of a run's history, and what its axis says
    "loss": ("smooth loss", "loss, smoothed (nats)"),
    "valid_loss": ("valid", "validation loss (nats)"),
    "learning_rate": ("rate", "learning rate"),
    "grad_norm": ("smooth norm", "gradient norm before clipping, smoothed"),
    "tokens_per_second": ("smooth speed", "tokens a second, smoothed"),
    "peak_bytes": ("peak", "MLX peak (bytes)"),
    "process_bytes": ("process", "process memory (bytes)"),
}
LOWER_IS_BETTER = ("loss", "seconds", "bytes", "perplexity", "bits_per_byte")
IN_MANY = (f"{PARAMETER}run_dir", "environment.", "prefix")  # say nothing about a run


def draw_runs(
    table: pd.DataFrame, y: str = "loss", labels: str | Sequence[str] | None = None
) -> bytes:
    """Curves of runs over their steps, as PNG bytes; runs without such numbers are left out.

    One that rises 20 times as high as usual leaves the picture, so that the others can be seen.

    Args:
        table: of `wb.runs`, or rows of it, at most 48; or the folder that the runs are in.
        y: loss, valid_loss, learning_rate, grad_norm, tokens_per_second, peak_bytes or
            process_bytes; loss, norm and throughput are smoothed as in the live chart.
        labels: columns that name a run; default: the first four parameters that differ.

    Raises:
        ConfigError: the table, y or a label is something else, or there is nothing to draw.
    """
    table = as_table(table)
    if y not in CURVES:
        raise ConfigError(f"unknown curve {y!r}", cure=f"Use one of {', '.join(CURVES)}.")
    if len(table) > MAX_CURVES:
        cure = f"Choose at most {MAX_CURVES}: table.sort_values('loss').head(10)."
        raise ConfigError(f"{len(table)} curves cannot be told apart", cure=cure)
    curves = dict(zip(_names(table, labels), (_curve(folder, y) for folder in table.folder)))
    found = [(name, curve) for name, curve in curves.items() if curve is not None]
    drawn = dict(sorted(found, key=lambda item: -item[1][1][-1]))  # the legend's order is theirs
    if not drawn:
        raise ConfigError(f"no run of the table has a {y}", cure="Look at their states.")
    figure = new_figure(11, max(4.4, 1.2 + 0.22 * min(len(drawn), MAX_CURVES // 2)))
    _draw_curves(figure.add_subplot(), drawn, y)
    headline(figure, _finding(drawn, y, len(curves) - len(drawn)))
    figure.tight_layout()
    return png(figure)


def _draw_curves(axes: Axes, drawn: dict[str, tuple[np.ndarray, np.ndarray]], y: str) -> None:
    for (name, (steps, values)), color in zip(drawn.items(), _colors(len(drawn))):
        marker = "o" if y == "valid_loss" or len(steps) == 1 else ""
        axes.plot(steps, values, color=color, linewidth=2, label=name, marker=marker, markersize=4)
    name_axes(axes, "step (optimizer updates)", CURVES[y][1])
    axes.grid(alpha=0.25, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    curves = [values for _, values in drawn.values()]
    if any(astray := _astray(curves)):
        near = [values for values, far in zip(curves, astray) if not far]
        low, high = min(each.min() for each in near), max(each.max() for each in near)
        axes.set_ylim(low - MARGIN * (high - low), high + MARGIN * (high - low))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(short_label))
    plain(axes)
    columns = 1 if len(drawn) <= MAX_CURVES // 2 else 2
    add_legend(axes, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8.5, ncols=columns)


def _astray(curves: Sequence[np.ndarray]) -> list[bool]:
    """Which curves rise so far above the others that these could not be told apart beside them."""
    tops = [values.max() for values in curves]
    usual = statistics.median_low(tops)
    return [usual > 0 and top > FAR * usual for top in tops]


def _names(table: pd.DataFrame, labels: str | Sequence[str] | None) -> list[str]:
    """A short text for each run, no two the same."""
    if labels is None:
        different = [n for n in compare_configs(table) if not str(n).startswith(IN_MANY)]
        chosen = [name for name in different if name.startswith(PARAMETER)] or different
        columns = chosen[:MAX_LABELS]
    else:
        columns = [column_of(table, n) for n in ([labels] if isinstance(labels, str) else labels)]
    names = [
        ", ".join(f"{short_name(column)} {in_words(row[column])}" for column in columns)
        for _, row in table.iterrows()
    ]
    names = [name[:LABEL] for name in names]
    again = pd.Series(names, dtype=object).duplicated(keep=False)
    return _numbered(
        _with_own(name, str(own)) if twice or not name else name
        for name, own, twice in zip(names, table["name"], again)
    )


def _with_own(name: str, own: str) -> str:
    """A label with the run's name; of a long one the end, where folders of a sweep differ."""
    room = max(OWN, LABEL - len(name) - len(" · "))
    own = own if len(own) <= room else f"…{own[1 - room :]}"
    return f"{name[: LABEL - room - len(' · ')]} · {own}".strip(" ·")


def _numbered(names: Iterable[str]) -> list[str]:
    """Texts that are cut already; those that are then the same get a number."""
    found: dict[str, None] = {}
    for name in names:
        own, number = name, 1
        while own in found:
            number += 1
            own = f"{name} ({number})"
        found[own] = None
    return list(found)


def short_name(column: str) -> str:
    """What a column is called where space is short: train.learning_rate → learning rate."""
    return str(column).rpartition(".")[2].replace("_", " ")


def in_words(value: object) -> str:
    """A value in few characters."""
    if isinstance(value, float | np.floating):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)[:LABEL]


def _curve(folder: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and values of a run; None if it has none, or is damaged."""
    try:
        history = History(read_reports(folder))
    except RunError:
        return None
    steps, values = thinned(history["step"], history[CURVES[y][0]])
    return (steps, values) if len(steps) else None


def _colors(count: int) -> list[object]:
    if count <= len(COLORS):
        return list(COLORS[:count])
    return list(matplotlib.colormaps[SHADES](np.linspace(DARKEST, LIGHTEST, count)))


def _finding(drawn: dict[str, tuple[np.ndarray, np.ndarray]], y: str, missing: int) -> str:
    ends = {name: values[-1] for name, (_, values) in drawn.items()}
    left_out = f" ({missing} without any left out)" if missing else ""
    if beyond := sum(_astray([values for _, values in drawn.values()])):
        left_out += f"; {beyond} beyond the picture"
    if "loss" not in y or len(drawn) == 1:
        return f"{short_name(y).capitalize()} of {len(drawn)} runs{left_out}"
    best = min(ends, key=ends.get)
    return f"Lowest {short_name(y)} at the end: {best}, with {ends[best]:.3g}{left_out}"


def draw_heat_map(
    table: pd.DataFrame, x: str, y: str, value: str, largest: bool | None = None
) -> bytes:
    """A number by two settings, as PNG bytes: the mean of the runs that share them in each cell.

    Args:
        table: of `wb.runs`, or rows of it; or the folder that the runs are in.
        x, y: settings, such as "rank" for parameters.rank; at most 30 values each.
        value: a column of numbers, such as "accuracy" for result.accuracy.
        largest: whether the title names the largest; default: not of losses, times and bytes.

    Raises:
        ConfigError: a column is missing or holds no numbers, or there is nothing to draw.
    """
    table = as_table(table)
    x, y, value = (column_of(table, name) for name in (x, y, value))
    if len({x, y, value}) < 3:
        raise ConfigError("x, y and value must be three columns")
    cells = _cells(table, x, y, value)
    if largest is None:
        largest = not value.endswith(LOWER_IS_BETTER)
    across, down = len(cells.columns), len(cells.index)
    figure = new_figure(max(6.0, 3.0 + 0.95 * across), max(3.2, 1.8 + 0.55 * down))
    axes = figure.add_subplot()
    _fill(axes, cells)
    axes.set_xticks(range(across), [in_words(name) for name in cells.columns])
    axes.set_yticks(range(down), [in_words(name) for name in cells.index])
    name_axes(axes, short_name(x), short_name(y))
    literal_ticks(axes)
    plain(axes, keep=())
    headline(figure, _best_cell(cells, x, y, value, largest))
    figure.tight_layout()
    return png(figure)


def _cells(table: pd.DataFrame, x: str, y: str, value: str) -> pd.DataFrame:
    """Means by y (rows, the largest above) and x (columns); NaN where no run has a number."""
    try:
        numbers = pd.to_numeric(table[value]).astype("float64")
    except (ValueError, TypeError):
        raise ConfigError(f"{value} holds what is no number") from None
    known = table.assign(**{value: numbers})[table[x].notna() & table[y].notna()]
    across, down = (sorted(known[name].unique(), key=_order) for name in (x, y))
    if not np.isfinite(known[value]).any():
        raise ConfigError(f"no run has a {value}, {x} and {y} together")
    if max(len(across), len(down)) > MAX_CELLS:
        cure = f"Choose rows with at most {MAX_CELLS} values of each."
        raise ConfigError(f"{len(across)} × {len(down)} cells are too many to read", cure=cure)
    means = known.pivot_table(value, y, x, "mean", observed=True)
    return means.reindex(index=down[::-1], columns=across)


def _order(value: object) -> tuple[bool, object]:
    is_number = isinstance(value, int | float | np.number)
    return (not is_number, value if is_number else str(value))


def _fill(axes: Axes, cells: pd.DataFrame) -> None:
    """Coloured cells with their numbers; hatched where there is none."""
    values = cells.to_numpy(float)
    finite = values[np.isfinite(values)]
    low, high = finite.min(), finite.max()
    norm = Normalize(low, high if high > low else low + 1)
    shades = ScalarMappable(norm, "cividis")
    for (row, column), number in np.ndenumerate(values):
        place = {"xy": (column - 0.5, row - 0.5), "width": 1, "height": 1}
        if not math.isfinite(number):
            style = {"facecolor": "none", "edgecolor": INK, "hatch": "///", "linewidth": 0}
            axes.add_patch(matplotlib.patches.Rectangle(**place, **style, alpha=0.5))
            continue
        color = shades.to_rgba(number)
        axes.add_patch(matplotlib.patches.Rectangle(**place, facecolor=color, linewidth=0))
        light = np.dot(color[:3], (0.299, 0.587, 0.114)) > 0.5
        ink = {"color": "black" if light else "white", "ha": "center", "va": "center"}
        label(axes, column, row, f"{number:.3g}", **ink)
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))


def _best_cell(cells: pd.DataFrame, x: str, y: str, value: str, largest: bool) -> str:
    flat = cells.where(np.isfinite(cells)).stack().dropna()
    at = flat.idxmax() if largest else flat.idxmin()
    place = f"{short_name(x)} {in_words(at[1])}, {short_name(y)} {in_words(at[0])}"
    equal = int((flat == flat[at]).sum()) - 1
    others = f", and in {equal} more" if equal else ""
    word = "Highest" if largest else "Lowest"
    return f"{word} {short_name(value)}: {flat[at]:.3g} at {place}{others}"
