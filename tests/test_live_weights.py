"""Pictures of weights: sizes follow the numbers, titles say the finding, grounds are clear."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tests.toy import toy_base, toy_model
from workbench.errors import ConfigError
from workbench.live import weights
from workbench.live.weights import draw_bytes, draw_differences, draw_rows, relative_differences

PLACES = [
    "model.embed_tokens",
    *(f"model.layers.{n}{part}" for n in range(2) for part in (".self_attn", ".mlp", "")),
    "model.norm",
    "logits",
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order."""
    saved = []
    original = Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        return original(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def sizes(**changes: object) -> pd.DataFrame:
    table = toy_base(**changes).report.table()
    return table.assign(file_bytes=table.num_bytes // 4, file_dtype="Q8_0")


def differences(values: float | list[float]) -> pd.DataFrame:
    return pd.DataFrame({"place": PLACES, "difference": values, "scale": 2.0})


def areas(figure: Figure) -> dict[tuple, float]:
    """Area of the mosaic by colour: bytes in memory."""
    found: dict[tuple, float] = {}
    for patch in figure.axes[1].patches:
        color = tuple(np.round(patch.get_facecolor(), 6))
        found[color] = found.get(color, 0) + patch.get_width() * patch.get_height()
    return found


def test_every_picture_has_a_transparent_ground():
    likeness = np.eye(8)
    for png in (
        draw_bytes(sizes()),
        draw_rows(likeness, likeness),
        draw_differences({"ours": differences(1e-6)}),
    ):
        assert pixels(png)[0, 0, 3] == 0


def test_area_of_the_mosaic_is_bytes(figures):
    table = sizes()
    draw_bytes(table)
    embedding = table[table.name.str.contains("embed_tokens")].num_bytes.sum()
    covered = sum(areas(figures[0]).values()) / 100 * weights.MEGA
    assert covered == pytest.approx(table.num_bytes.sum(), rel=0.02), "but for the gaps"
    (block,) = [p for p in figures[0].axes[1].patches if p.get_height() > 99 and p.get_x() == 0]
    assert block.get_width() * weights.MEGA == pytest.approx(embedding, rel=0.01)


def test_a_wider_module_takes_more_area(figures):
    draw_bytes(sizes())
    draw_bytes(sizes(intermediate_size=256))
    narrow, wide = (max(areas(figure).values()) for figure in figures)
    assert wide > narrow


def test_title_says_both_sizes_and_the_largest_block(figures):
    table = sizes().assign(file_bytes=1_000_000, num_bytes=2_000_000)
    draw_bytes(table)
    assert f"{len(table)} MB of tensors in the file, {2 * len(table)} MB" in title(figures[0])
    assert "layer 0" in title(figures[0])


def test_names_that_would_begin_a_formula_are_drawn_as_they_are():
    hostile = sizes()
    hostile["name"] = hostile.name.str.replace("up_proj", r"$\frac{$")
    hostile["file_dtype"] = r"$\frac{$"
    assert pixels(draw_bytes(hostile)).size
    broken = differences(1.0).assign(place=r"$\frac{$")
    assert pixels(draw_differences({r"$\frac{$": broken})).size


def test_a_model_without_layers_is_drawn():
    one = pd.DataFrame(
        {"name": ["w"], "file_dtype": ["F32"], "file_bytes": [4_000_000], "num_bytes": [4_000_000]}
    )
    assert pixels(draw_bytes(one)).size


@pytest.mark.parametrize("table", [sizes().head(0), sizes().assign(num_bytes=0)])
def test_nothing_to_draw_is_refused(table):
    with pytest.raises(ConfigError, match="no bytes"):
        draw_bytes(table)


def test_title_of_the_rows_says_what_the_two_orders_show(figures):
    apart = np.zeros((8, 8))
    apart[np.arange(4), np.arange(4, 8)] = 0.75
    draw_rows(-apart, apart)
    assert "−0.75 in the file, +0.75 as loaded" in title(figures[0])


def test_the_two_orders_are_drawn_each_in_its_panel(figures):
    random = np.random.default_rng(0)
    stored, loaded = random.uniform(-1, 1, (2, 8, 8))
    draw_rows(stored, loaded)
    off_diagonal = ~np.eye(8, dtype=bool)
    for axes, given in zip(figures[0].axes, (stored, loaded)):
        shown = np.asarray(axes.images[0].get_array())
        assert np.array_equal(shown[off_diagonal], given[off_diagonal])


def test_title_names_the_first_module_that_departs(figures):
    departing = [1e-6] * 4 + [0.3, 1e-6, 0.4, 0.5, 0.5]
    draw_differences({"good": differences(1e-6), "bad": differences(departing)})
    assert f"bad: departs at {PLACES[4]}" in title(figures[0])
    assert "good: at most 5e-07 apart" in title(figures[0])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_difference_that_is_no_number_departs(value, figures):
    draw_differences({"ours": differences([1e-6] * 8 + [value])})
    assert "departs at logits" in title(figures[0])
    drawn = max(figures[0].axes[0].lines, key=lambda line: len(line.get_ydata())).get_ydata()
    assert drawn[-1] == max(drawn) > 1


def test_equal_networks_are_drawn_at_the_foot_of_the_axis(figures):
    draw_differences({"ours": differences(0.0)})
    axes = figures[0].axes[0]
    (line,) = [line for line in axes.lines if len(line.get_ydata()) == len(PLACES)]
    assert set(line.get_ydata()) == {axes.get_ylim()[0]}


def test_differences_are_relative_to_the_largest_output():
    assert relative_differences(differences(1.0)).tolist() == [0.5] * len(PLACES)


def test_layers_are_numbered_on_the_axis(figures):
    draw_differences({"ours": differences(1e-6)})
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert labels == ["0", "1"]


def test_no_differences_are_refused():
    for tables in ({}, {"ours": differences(0.0).head(0)}):
        with pytest.raises(ConfigError, match="no differences"):
            draw_differences(tables)


def test_recorded_differences_of_a_model_with_itself_are_exact(figures):
    reference = pytest.importorskip("workbench.probes.model_checks.reference")
    model = toy_model()
    table = reference.layer_differences(model, toy_model(), np.array([[3, 4, 5, 6]]))
    draw_differences({"ours": table})
    assert "at most 0e+00 apart" in title(figures[0])
