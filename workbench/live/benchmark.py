"""A benchmark's ratios and peaks as bars."""

from __future__ import annotations

import itertools
import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from workbench.errors import ConfigError
from workbench.live.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    VIOLET,
    add_legend,
    headline,
    label,
    literal_ticks,
    name_axes,
    new_figure,
    plain,
    png,
)
from workbench.live.scales import log_ticks, short_label

COLORS = (BLUE, ORANGE, GREEN, VIOLET, RED)
ROW, EDGES = 0.3, 1.5  # inches: of a bar, and of what is above and below them
GAP = 0.7  # bars' heights between two workloads


def draw_speed(table: pd.DataFrame, ours: str = "ours") -> bytes:
    """How many times as long each peer takes, on a logarithmic axis, as PNG bytes.

    Args:
        table: rows with workload, title, peer, ratio, and least and most of the paired ratios.
        ours: the peer that the others are compared with; it has no bars.

    Raises:
        ConfigError: there is no other peer.
    """
    rows = table[(table["peer"] != ours) & (table["ratio"] > 0)]
    if rows.empty:
        raise ConfigError("no peer to compare with", cure="Let mlx-lm take part.")
    places = _places(rows)
    figure = new_figure(12, EDGES + ROW * (places[-1] + 1))
    axes = figure.subplots()
    axes.set_xscale("log")
    low = min(0.8, 0.8 * rows[["ratio", "least"]].min().min())
    high = max(2.0, 2.2 * rows[["ratio", "most"]].max().max())
    for place, (_, row) in zip(places, rows.iterrows()):
        color = _color(table, row["peer"])
        axes.barh(place, row["ratio"] - 1, left=1, height=0.8, color=color)
        axes.plot([row["least"], row["most"]], [place, place], color=INK, linewidth=1.2)
        end = max(row["ratio"], row["most"], 1)
        label(axes, 1.04 * end, place, f"{row['ratio']:.3g} ×", va="center", color=INK)
    axes.axvline(1, color=INK, linewidth=1.4)
    axes.set_xlim(low, high)
    ticks = log_ticks(low, high)
    axes.set_xticks(ticks, [short_label(tick, 0) for tick in ticks])
    axes.minorticks_off()
    _name_workloads(axes, rows, places)
    name_axes(axes, "times as long as ours (logarithmic; thin line: range of the paired steps)", "")
    _finish(figure, axes, table, list(rows["peer"].unique()), _speed_finding(rows))
    return png(figure)


def draw_peaks(table: pd.DataFrame) -> bytes:
    """Peak memory of MLX (full) and of the process (pale) by workload and peer, as PNG bytes.

    Args:
        table: rows with workload, title, peer, "MLX peak GB" (missing for torch) and
            "process peak GB".

    Raises:
        ConfigError: no row has a peak.
    """
    if "process peak GB" not in table or table["process peak GB"].isna().all():
        raise ConfigError("no peaks to draw", cure="Run a workload that trains: W1 to W4.")
    rows = table[table["process peak GB"].notna()]
    places = _places(rows)
    figure = new_figure(12, EDGES + ROW * (places[-1] + 1))
    axes = figure.subplots()
    largest = rows["process peak GB"].max()
    for place, (_, row) in zip(places, rows.iterrows()):
        color, mlx, process = _color(table, row["peer"]), row["MLX peak GB"], row["process peak GB"]
        axes.barh(place, process, height=0.8, color=color, alpha=0.35)
        text = f"{process:.2f}"
        if not math.isnan(mlx):
            axes.barh(place, mlx, height=0.8, color=color)
            text = f"{mlx:.2f} / {text}"
        end = max(process, 0 if math.isnan(mlx) else mlx)
        label(axes, end + 0.01 * largest, place, text, va="center", color=INK)
    axes.set_xlim(0, 1.15 * largest)
    _name_workloads(axes, rows, places)
    name_axes(axes, "peak (GB): arrays of MLX full, the process pale", "")
    _finish(figure, axes, table, list(rows["peer"].unique()), _peak_finding(rows))
    return png(figure)


def _places(rows: pd.DataFrame) -> list[float]:
    """A place for each bar, with a gap between two workloads."""
    groups = (rows["workload"] + rows["title"]).tolist()
    places = [0.0]
    for before, here in itertools.pairwise(groups):
        places.append(places[-1] + 1 + (GAP if here != before else 0))
    return places


def _name_workloads(axes: Axes, rows: pd.DataFrame, places: list[float]) -> None:
    """Each workload's name beside the middle of its bars."""
    at: dict[str, list[float]] = {}
    for place, (_, row) in zip(places, rows.iterrows()):
        at.setdefault(f"{row['workload']}  {_wrapped(row['title'])}", []).append(place)
    middles = [sum(group) / len(group) for group in at.values()]
    axes.set_yticks(middles, list(at), color=INK, fontsize=9)
    literal_ticks(axes)
    axes.invert_yaxis()


def _wrapped(title: str, width: int = 34) -> str:
    lines = [""]
    for word in title.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _color(table: pd.DataFrame, peer: str) -> str:
    return COLORS[list(table["peer"].unique()).index(peer) % len(COLORS)]


def _finish(figure: object, axes: Axes, table: pd.DataFrame, peers: list[str], text: str) -> None:
    plain(axes, keep=("bottom",))
    patches = [Patch(color=_color(table, peer), label=peer) for peer in peers]
    add_legend(axes, handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(peers))
    headline(figure, text)
    figure.tight_layout()


def _speed_finding(rows: pd.DataFrame) -> str:
    spans = [
        f"{peer} {_span(ratios)}" for peer, ratios in rows.groupby("peer", sort=False)["ratio"]
    ]
    return f"Times as long as ours: {', '.join(spans[:2])}"


def _peak_finding(rows: pd.DataFrame) -> str:
    others = rows[rows["MLX peak GB"].notna() & (rows["ours / its MLX peak"] != 1)]
    if others.empty:
        return "Peak memory of a training step"
    peer = others["peer"].iloc[0]
    shares = others[others["peer"] == peer]["ours / its MLX peak"]
    return f"Ours holds {_span(100 * shares)} % of the arrays of {peer}"


def _span(values: pd.Series) -> str:
    least, most = f"{values.min():.2g}", f"{values.max():.2g}"
    if values.max() >= 100:
        least, most = f"{values.min():.0f}", f"{values.max():.0f}"
    return least if least == most else f"{least} to {most}"
