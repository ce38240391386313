"""Pictures of a model's weights: bytes by module, the order of rows, and where two models part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Rectangle

from workbench.errors import ConfigError
from workbench.live.figures import INK, headline, label, new_figure, plain, png
from workbench.models.inspection import half_apart, split_name

MEGA = 1e6
FAMILIES = {"self_attn": "#2f6fde", "attn": "#2f6fde", "mlp": "#e8743b"}
OTHER = "#17695f"
KINDS = ("#8a63d2", "#d9a520", "#e05260", "#2a9d8f", "#2f6fde", "#e8743b")
LOW, MIDDLE, HIGH = "#2f6fde", "#f4f4f2", "#d1492e"  # of a diverging scale
SERIES = ("#2f6fde", "#e8743b", "#2a9d8f")
SMALLEST_LABEL = 0.02  # share of a block's height from which a module is named
LABEL_STEP = 4.2  # smallest distance between two names, in percent of the height
SHADES = (0.34, 0.17, 0.0, -0.2)  # towards white, and towards black


def draw_bytes(table: pd.DataFrame) -> bytes:
    """Bytes of a model, in its file by dtype and in memory by module, as PNG bytes.

    On the right, area is bytes: a block (the embedding, a layer) is as wide as its share of the
    model, a module as high as its share of its block. The ground is transparent.

    Args:
        table: one row a parameter: name, file_dtype, file_bytes, num_bytes (in memory).

    Raises:
        ConfigError: no parameter, or none that takes memory.
    """
    if not len(table) or not table.num_bytes.sum():
        raise ConfigError("no bytes to draw", cure="Give the table of a model that was loaded.")
    figure = new_figure(12, 5.4)
    left, right = figure.subplots(1, 2, width_ratios=[1, 5.2])
    _draw_dtypes(left, table)
    blocks = _blocks(table)
    _draw_mosaic(right, blocks)
    headline(figure, _bytes_finding(table, blocks))
    figure.subplots_adjust(left=0.06, right=0.85, top=0.87, bottom=0.11, wspace=0.17)
    return png(figure)


def _blocks(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Bytes in memory: block → (module → bytes), in the order of the table."""
    split = [split_name(name) for name in table.name]
    places = table.assign(block=[b for b, _ in split], module=[m for _, m in split])
    sums = places.groupby(["block", "module"], sort=False).num_bytes.sum()
    sums = sums[sums > 0]
    return {block: part.droplevel(0) for block, part in sums.groupby(level=0, sort=False)}


def _bytes_finding(table: pd.DataFrame, blocks: Mapping[str, pd.Series]) -> str:
    in_file, in_memory = table.file_bytes.sum() / MEGA, table.num_bytes.sum() / MEGA
    largest = max(blocks, key=lambda block: blocks[block].sum())
    share = 100 * blocks[largest].sum() / table.num_bytes.sum()
    grown = f"{in_file:.0f} MB of tensors in the file, {in_memory:.0f} MB in memory"
    return f"{grown}; {share:.0f} % of that is one block, {largest}"


def _draw_dtypes(axes: Axes, table: pd.DataFrame) -> None:
    sums = table.groupby("file_dtype")[["file_bytes", "num_bytes"]].sum()
    sums = sums.sort_values("num_bytes", ascending=False) / MEGA
    top = sums.num_bytes.sum()
    for at, column in enumerate(("file_bytes", "num_bytes")):
        bottom = 0.0
        for (dtype, height), color in zip(sums[column].items(), _cycle(KINDS, len(sums))):
            axes.bar(at, height, bottom=bottom, width=0.72, color=color)
            if height > 0.045 * top:
                middle = bottom + height / 2
                label(axes, at, middle, dtype, color="white", ha="center", va="center")
            bottom += height
    axes.set_xticks([0, 1], ["in the\nfile", "in\nmemory"])
    axes.set_ylabel("bytes (MB), by dtype in the file", color=INK)
    axes.margins(y=0.02)
    plain(axes, keep=("left",))


def _draw_mosaic(axes: Axes, blocks: Mapping[str, pd.Series]) -> None:
    colors = _module_colors(blocks)
    whole, left = sum(part.sum() for part in blocks.values()), 0.0
    for block, part in blocks.items():
        width, bottom = part.sum() / MEGA, 0.0
        gap = min(0.12 * width, 0.002 * whole / MEGA)  # between blocks
        for module, size in part.items():
            height = 100 * size / part.sum()
            place, face = (left, bottom), colors[module]
            axes.add_patch(Rectangle(place, width - gap, height, facecolor=face, linewidth=0))
            bottom += height
        if len(part) == 1 and width > 0.1 * whole / MEGA:
            text = f"{block}\n{width:.0f} MB"
            label(axes, left + width / 2, 50, text, color="white", ha="center", va="center")
        left += width
    axes.set_xlim(0, left)
    axes.set_ylim(0, 100)
    axes.set_xlabel("bytes in memory (MB): the blocks side by side", color=INK)
    axes.set_ylabel("share of its block (%)", color=INK)
    _name_modules(axes, blocks, left)
    plain(axes, keep=())


def _name_modules(axes: Axes, blocks: Mapping[str, pd.Series], right: float) -> None:
    """Name the modules of the last layer at the right edge, with the bytes over all layers."""
    layers = [part for part in blocks.values() if len(part) > 1]
    if not layers:
        return
    totals = pd.concat(layers).groupby(level=0).sum() / MEGA
    shares, bottom, at = layers[-1] / layers[-1].sum(), 0.0, -LABEL_STEP
    for module, share in shares.items():
        if share >= SMALLEST_LABEL:
            at = max(100 * (bottom + share / 2), at + LABEL_STEP)
            text = f"{module}  {totals[module]:.0f} MB"
            label(axes, 1.01 * right, at, text, color=INK, va="center")
        bottom += share


def _module_colors(blocks: Mapping[str, pd.Series]) -> dict[str, tuple]:
    """A hue a family (attention, feed-forward, the rest), a shade a module."""
    families: dict[str, list[str]] = {}
    for module in dict.fromkeys(module for part in blocks.values() for module in part.index):
        families.setdefault(FAMILIES.get(module.split(".")[0], OTHER), []).append(module)
    return {
        module: _shaded(hue, SHADES[place % len(SHADES)])
        for hue, modules in families.items()
        for place, module in enumerate(modules)
    }


def _shaded(hue: str, shade: float) -> tuple[float, ...]:
    color = np.array(to_rgb(hue))
    return tuple(color + shade * (1 - color) if shade > 0 else color * (1 + shade))


def draw_rows(stored: np.ndarray, loaded: np.ndarray) -> bytes:
    """How alike the rows of a head are: in the file's order and in the network's, as PNG bytes.

    Args:
        stored, loaded: (head_dim, head_dim) of `row_likeness`, for the two orders.
    """
    figure = new_figure(12, 5.6)
    panels = figure.subplots(1, 2)
    colors = LinearSegmentedColormap.from_list("likeness", [LOW, MIDDLE, HIGH])
    names = ("in the file's order", "in the network's order: partners are {} rows apart")
    for axes, likeness, name in zip(panels, (stored, loaded), names):
        shown = np.where(np.eye(len(likeness), dtype=bool), np.nan, likeness)
        image = axes.imshow(shown, vmin=-1, vmax=1, cmap=colors, interpolation="nearest")
        axes.set_title(name.format(len(likeness) // 2), color=INK, fontsize=11, loc="left")
        axes.set_xlabel("row of a head", color=INK)
        axes.set_ylabel("row of a head", color=INK)
        ticks = np.linspace(0, len(likeness), 5, dtype=int)[:-1]
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        plain(axes, keep=())
    bar = figure.colorbar(image, ax=panels, fraction=0.025, pad=0.02)
    bar.set_label("correlation of the rows' lengths over all heads", color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
    before, after = (f"{half_apart(each):+.2f}".replace("-", "−") for each in (stored, loaded))
    headline(
        figure,
        f"Rows half a head apart: correlation {before} in the file, {after} as loaded",
        0.125,
    )
    return png(figure)


def draw_differences(tables: Mapping[str, pd.DataFrame], bound: float = 1e-4) -> bytes:
    """Where two networks part, module by module on a log axis, as PNG bytes.

    Args:
        tables: pair → a table of `layer_differences`.
        bound: relative difference below which two modules agree.

    Raises:
        ConfigError: no table, or one without a module.
    """
    if not tables or not all(len(table) for table in tables.values()):
        raise ConfigError("no differences to draw", cure="The networks share no module's path.")
    figure = new_figure(12, 4.8)
    axes = figure.subplots()
    relative = {pair: relative_differences(table) for pair, table in tables.items()}
    floor = bound * 1e-6
    for (pair, values), color in zip(relative.items(), _cycle(SERIES, len(tables))):
        shown = np.nan_to_num(values, nan=1 / bound, posinf=1 / bound).clip(min=floor)
        axes.plot(shown, "o", color=color, markersize=4, alpha=0.8, label=pair, clip_on=False)
    axes.axhline(bound, color=INK, linewidth=1.2, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.text(0, 1.25 * floor, "exactly equal", color=INK, fontsize=9, va="bottom")
    axes.text(0, 1.3 * bound, f"bound {bound:g}", color=INK, fontsize=9, va="bottom")
    axes.set_ylabel("difference (share of the largest output)", color=INK)
    _mark_layers(axes, next(iter(tables.values())).place)
    plain(axes, keep=("left", "bottom"))
    axes.grid(axis="y", alpha=0.25, color=INK)
    legend = axes.legend(loc="center right", frameon=False, labelcolor=INK, fontsize=10)
    for text in legend.get_texts():
        text.set_parse_math(False)
    headline(figure, _parting(tables, relative, bound))
    figure.subplots_adjust(left=0.07, right=0.99, top=0.89, bottom=0.12)
    return png(figure)


def relative_differences(table: pd.DataFrame) -> np.ndarray:
    """A module's largest difference over its largest output, a row of `layer_differences` each."""
    return (table["difference"] / table["scale"]).to_numpy()


def _mark_layers(axes: Axes, places: pd.Series) -> None:
    layers = places.map(lambda place: split_name(f"{place}.output")[0]).to_numpy()
    starts = [at for at, name in enumerate(layers) if at == 0 or name != layers[at - 1]]
    marked = [at for at in starts if layers[at].startswith("layer ")]
    every = max(1, -(-len(marked) // 10))  # at most ten numbers
    axes.set_xticks(marked[::every], [layers[at].removeprefix("layer ") for at in marked[::every]])
    axes.set_xlim(-1, len(places))
    axes.set_xlabel("layer; a dot is a module, in the order in which they compute", color=INK)


def _parting(
    tables: Mapping[str, pd.DataFrame], relative: Mapping[str, np.ndarray], bound: float
) -> str:
    """The finding: how far each pair agrees, or the first module that departs."""
    parts = []
    for pair, values in relative.items():
        beyond = ~(values <= bound)
        first = tables[pair].place.iloc[int(beyond.argmax())]
        agrees = f"at most {values.max():.0e} apart"
        parts.append(f"{pair}: {f'departs at {first}' if beyond.any() else agrees}")
    return "; ".join(parts)


def _cycle(colors: Sequence[str], count: int) -> list[str]:
    return [colors[place % len(colors)] for place in range(count)]
