"""The picture of a run: loss, memory, throughput and gradient norm on one figure."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from workbench.live.figures import INK, add_legend, name_axes, new_figure, plain
from workbench.live.history import History, thinned
from workbench.live.scales import log_ticks, round_down, round_up, short_label, shown_steps
from workbench.tuning.config import StepReport

LOSS, SMOOTH, VALID = "#79a3ea", "#2f6fde", "#e8743b"
ACTIVE, CACHE, PEAK, PROCESS = "#2a9d8f", "#d9a520", "#8a63d2", "#e05260"
NORM = "#b9a1e8"
WIDTH, HEIGHT = 10.6, 5.9  # inches; at 110 dots an inch as wide as a notebook's cell
GIGA = 1e9
LOWER, MIDDLE, RIGHT = 0.565, 0.497, 0.752  # where the parts of the figure meet, of its size
CORNERS = ((0, 1, 0, LOWER), (0, MIDDLE, LOWER, 1), (MIDDLE, RIGHT, LOWER, 1), (RIGHT, 1, LOWER, 1))
ROOM = (0.01, 0.03, 0.06, 0.06)  # right of the last step, of the axis: its number must not be cut
CLEAR = (255, 255, 255, 0)
MEMORY = ("peak", "process", "limit")
PER_TOKEN = "cross-entropy (nats a token)"
PER_PAIR = "loss of the preferences (nats a pair)"
SETTLED = 20  # losses from which the axis may begin above zero
NORM_RANGE = 1e4  # largest over smallest gradient norm that is shown
TITLE = {"color": INK, "fontsize": 11.5, "loc": "left", "fontweight": "bold", "parse_math": False}
THIN = "\u202f"  # a narrow space between thousands
QUICK, SMALL = 1, 6  # compression of a live picture, and of one that is kept


class RunChart:
    """One figure, kept alive: `update` moves its lines, the layout never changes."""

    def __init__(self):
        self._figure = new_figure(WIDTH, HEIGHT)
        grid = self._figure.add_gridspec(
            2, 4, height_ratios=[3, 2.1], left=0.058, right=0.988, top=0.935, bottom=0.085,
            hspace=0.42, wspace=0.42,
        )  # fmt: skip
        self._loss = self._figure.add_subplot(grid[0, :])
        self._memory = self._figure.add_subplot(grid[1, :2])
        self._speed = self._figure.add_subplot(grid[1, 2])
        self._norm = self._figure.add_subplot(grid[1, 3])
        self._lines: dict[str, Line2D] = {}
        self._areas: dict[str, PolyCollection] = {}
        self._prepare_loss()
        self._prepare_memory()
        self._prepare_small()
        self._hold_still()
        self._ground, self._limits = None, {}  # what does not move; the limits that it shows

    def update(self, history: History) -> None:
        """Show what the history holds."""
        steps = history["step"]
        for name in self._curves:
            values = history[name] / GIGA if name in MEMORY else history[name]
            self._lines[name].set_data(*thinned(steps, values))
            if name != "valid":  # a line of one point has no length
                self._lines[name].set_marker("o" if np.isfinite(values).sum() == 1 else "")
        of_pairs = history.last is not None and "margin" in (history.last.extras or {})
        self._loss.set_ylabel(PER_PAIR if of_pairs else PER_TOKEN)
        self._stack(history)
        best = history.best_validation
        self._lines["best"].set_data(*([[part] for part in best] if best else [[], []]))
        self._scale(history)
        self._title(history)

    def png(self, compression: int = SMALL) -> bytes:
        """The figure as PNG bytes on a transparent ground."""
        canvas = self._figure.canvas
        self._draw_ground()
        canvas.restore_region(self._ground)
        for artist in self._moving:
            artist.axes.draw_artist(artist)
        buffer = io.BytesIO()
        picture = Image.frombuffer("RGBA", self.size, canvas.buffer_rgba())
        picture.save(buffer, format="png", compress_level=compression)
        return buffer.getvalue()

    def _draw_ground(self) -> None:
        """Draw axes, ticks and legends, but only where a limit has moved since the last time.

        Most of the time that a picture takes goes into their letters.
        """
        canvas = self._figure.canvas
        if self._ground is None:
            canvas.draw()
        else:
            canvas.restore_region(self._ground)
        for axes, corner in zip(self._figure.axes, CORNERS):
            limits = (*axes.get_xlim(), *axes.get_ylim(), axes.get_ylabel())
            if limits == self._limits.get(axes):
                continue
            self._limits[axes] = limits
            if self._ground is not None:
                left, right = (round(part * self.size[0]) for part in corner[:2])
                top, bottom = (round(part * self.size[1]) for part in corner[2:])
                np.asarray(canvas.buffer_rgba())[top:bottom, left:right] = CLEAR
                axes.draw(canvas.get_renderer())
        self._ground = canvas.copy_from_bbox(self._figure.bbox)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._figure.canvas.get_width_height()

    def _hold_still(self) -> None:
        """Let the canvas draw everything but what moves."""
        self._curves = [name for name in self._lines if name != "best"]
        titles = [axes.set_title("", **TITLE) for axes in self._figure.axes]
        self._moving = [*self._areas.values(), *self._lines.values(), *titles]
        for artist in self._moving:
            artist.set_animated(True)
        self._figure.patch.set_visible(False)
        for axes in self._figure.axes:
            axes.patch.set_visible(False)

    def _line(self, axes: Axes, name: str, color: str, label: str = "", **style: object) -> None:
        (self._lines[name],) = axes.plot([], [], color=color, label=label, **style)

    def _prepare_loss(self) -> None:
        axes = self._loss
        self._line(axes, "loss", LOSS, "each step", linewidth=1.3)
        self._line(axes, "smooth loss", SMOOTH, "smoothed", linewidth=2.4)
        self._line(axes, "valid", VALID, "validation", marker="o", markersize=4.5, linewidth=1.8)
        ring = {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.8}
        self._line(axes, "best", VALID, "best", linestyle="", marker="o", **ring)
        for name in ("valid", "best"):
            self._lines[name].set_clip_on(False)
        _dress(axes, PER_TOKEN)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_label_coords(-0.042, 0.5)
        add_legend(axes, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.2)

    def _prepare_memory(self) -> None:
        axes = self._memory
        for name, color in (("active", ACTIVE), ("cache", CACHE)):
            label = f"MLX {name}"
            self._areas[name] = axes.fill_between([], [], [], color=color, alpha=0.75, label=label)
            self._areas[name].set_linewidth(0)
        self._line(axes, "peak", PEAK, "MLX peak", linewidth=1.8, linestyle="--")
        self._line(axes, "process", PROCESS, "process", linewidth=2.4)
        self._line(axes, "limit", INK, "limit", linewidth=1.8, linestyle=":")
        _dress(axes, "memory (GB)")
        add_legend(
            axes, loc="upper left", ncols=5, fontsize=8.8, columnspacing=1.0, handlelength=1.3,
            borderaxespad=0.1, handletextpad=0.5,
        )  # fmt: skip

    def _prepare_small(self) -> None:
        self._line(self._speed, "speed", LOSS, linewidth=1.0)
        self._line(self._speed, "smooth speed", SMOOTH, linewidth=2.2)
        self._line(self._norm, "norm", NORM, linewidth=1.0)
        self._line(self._norm, "smooth norm", PEAK, linewidth=2.2)
        for axes, unit in ((self._speed, "tokens a second"), (self._norm, "norm before clipping")):
            _dress(axes, unit)
            axes.yaxis.set_label_coords(-0.26, 0.5)  # whatever the ticks say
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
        self._norm.set_yscale("log")
        self._norm.yaxis.set_minor_locator(NullLocator())
        self._norm.yaxis.set_major_formatter(FuncFormatter(short_label))
        self._speed.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))

    def _stack(self, history: History) -> None:
        """Active memory from zero, the cache on top of it."""
        active, cache = history["active"] / GIGA, history["cache"] / GIGA
        lower = np.zeros(len(history))
        for name, upper in (("active", active), ("cache", active + cache)):
            steps, tops = thinned(history["step"], upper)
            self._areas[name].set_data(
                steps, np.interp(steps, history["step"], lower) if len(history) else lower, tops
            )
            lower = upper

    def _scale(self, history: History) -> None:
        """Limits that move in round steps, so that the picture keeps still between them."""
        last = shown_steps(history.last)
        for axes, room in zip(self._figure.axes, ROOM):
            axes.set_xlim(1, last + room * (last - 1))
        losses = _finite(history["loss"], history["valid"])
        top = round_up(1.04 * losses.max()) if len(losses) else 1.0
        far = len(losses) >= SETTLED and losses.min() > top / 3
        low = round_down(losses.min()) if far else 0.0
        self._loss.set_ylim(low, top)
        held = _finite(*(history[name] for name in ("active", "peak", "process"))) / GIGA
        stacked = _finite(history["active"] + history["cache"]) / GIGA
        highest = max([*held, *stacked], default=0.7)
        limits = _finite(history["limit"]) / GIGA
        near = len(limits) and limits.max() < 2 * highest
        self._memory.set_ylim(0, round_up(1.3 * max(highest, limits.max() if near else 0.0)))
        speeds, norms = _finite(history["speed"]), _finite(history["norm"])
        self._speed.set_ylim(0, round_up(1.05 * speeds.max()) if len(speeds) else 1)
        norms = norms[norms > 0]
        if len(norms):
            high = round_up(1.1 * norms.max())
            low = round_down(min(max(0.9 * norms.min(), high / NORM_RANGE), high / 4))
            self._norm.set_ylim(low, high)
            self._norm.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))

    def _title(self, history: History) -> None:
        last = history.last
        if last is None:
            titles = "No step has been made yet", "Memory", "Throughput", "Gradient"
        else:
            start, now = history["smooth loss"][0], history["smooth loss"][-1]
            holder = "The process" if last.process_bytes is not None else "MLX"
            held = last.process_bytes
            held = held if held is not None else last.active_bytes + last.cache_bytes
            titles = (
                f"Step {last.step:,} of {last.total_steps:,}: loss {start:.2f} → {now:.2f}".replace(
                    ",", THIN
                ),
                f"{holder} holds {held / GIGA:.2f} GB{_limit_in_words(history)}",
                f"{np.median(history['speed'][-20:]):,.0f} tokens/s".replace(",", THIN),
                f"Gradient {last.grad_norm:.2g}",
            )
        for axes, title in zip((self._loss, self._memory, self._speed, self._norm), titles):
            axes.set_title(title, **TITLE)


def draw(
    reports: Sequence[StepReport],
    limit_of: Callable[[StepReport], int | None] = lambda report: None,
) -> bytes:
    """The chart of a run so far, as PNG bytes with a transparent ground.

    Args:
        reports: of its steps; none draws empty axes.
        limit_of: report → process memory at which the run is stopped, or None.
    """
    chart = RunChart()
    chart.update(History(reports, limit_of))
    return chart.png()


def _dress(axes: Axes, unit: str) -> None:
    name_axes(axes, "step (optimizer updates)", unit)
    axes.grid(alpha=0.25, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(short_label))
    plain(axes)


def _finite(*columns: np.ndarray) -> np.ndarray:
    values = np.concatenate(columns)
    return values[np.isfinite(values)]


def _limit_in_words(history: History) -> str:
    limit = history["limit"][-1]
    return f" (limit {limit / GIGA:.1f} GB)" if np.isfinite(limit) else ""
