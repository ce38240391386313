"""What several machines would gain over one, by the links between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    name_axes,
    new_figure,
    plain,
    png,
)
from workbench.tuning.scaling import Scaling

COLORS = (BLUE, ORANGE, GREEN, VIOLET, YELLOW, RED)
Curves = Mapping[str, Sequence[Scaling]]  # by link


def draw_scaling(curves: Mapping[str, Curves]) -> bytes:
    """Speed over one machine, by number of machines: a panel for each job, a line a link; PNG.

    Args:
        curves: job → link → what `predict_scaling` expects of each number of machines. Every job
            has the same links, at most six.

    Raises:
        ConfigError: there is nothing to draw, or more links than colours.
    """
    if not curves or not all(all(links.values()) and links for links in curves.values()):
        raise ConfigError("no scaling to draw", cure="Give predict_scaling's answers, by link.")
    if max(map(len, curves.values())) > len(COLORS):
        raise ConfigError(f"more than {len(COLORS)} links in one picture")
    figure = new_figure(12, 4.2)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    most = max(
        point.ranks for links in curves.values() for line in links.values() for point in line
    )
    for axes, (job, links) in zip(panels, curves.items()):
        axes.plot([1, most], [1, most], color=INK, linestyle=":", label="if links cost nothing")
        for (link, line), color in zip(links.items(), COLORS):
            points = [(point.ranks, point.speedup) for point in line]
            axes.plot(*zip(*points), color=color, linewidth=2, marker="o", label=link)
        name_axes(axes, "machines", "times as fast as one" if axes is panels[0] else "", job)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, color=INK)
        plain(axes)
    add_legend(panels[0], loc="upper left")
    headline(figure, _finding(curves))
    figure.tight_layout()
    return png(figure)


def _finding(curves: Mapping[str, Curves]) -> str:
    """What the largest number of machines gains, by job."""
    parts, most = [], 0
    for job, links in curves.items():
        ends = [line[-1] for line in links.values()]
        most = max(most, *(end.ranks for end in ends))
        slowest, fastest = (pick(end.speedup for end in ends) for pick in (min, max))
        parts.append(f"{job.partition(':')[0]}: {slowest:.1f} to {fastest:.1f} ×")
    return " · ".join([f"{most} machines", *parts])
