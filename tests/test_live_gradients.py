"""Pictures of gradients: every tensor has its cell, titles count, nothing is read as a formula."""

from __future__ import annotations

import io

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from mlx.utils import tree_flatten

from tests.toy import toy_model
from tests.toy_checks import BATCH, adapted
from workbench.errors import ConfigError
from workbench.live.gradients import (
    FROZEN,
    ZERO,
    draw_gradients,
    draw_pending,
    draw_slopes,
    gradient_norms,
    slope_errors,
)
from workbench.models.llama import Llama
from workbench.tuning.losses import plain_loss


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


def norms(model: Llama) -> pd.Series:
    gradients = nn.value_and_grad(model, plain_loss)(model, BATCH)[1]
    return gradient_norms(model, dict(tree_flatten(gradients)))


def colors(axes) -> list[tuple]:
    return [tuple(patch.get_facecolor()) for patch in axes.patches]


def panel(figure: Figure, at: int = 0):
    return [axes for axes in figure.axes if axes.get_visible() and axes.patches][at]


def loop(pending: list[int], active: list[float] | None = None, final: float = 9e6) -> pd.DataFrame:
    table = pd.DataFrame({"pending": pending, "active_bytes": active or [1e6] * len(pending)})
    table.loc[table.index[-1], "final_bytes"] = final
    return table


# Norms


def test_norms_cover_every_parameter_and_are_nan_where_it_is_frozen():
    model = adapted()
    found = norms(model)
    assert list(found.index) == [name for name, _ in tree_flatten(model.parameters())]
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert set(found.dropna().index) == trainable
    assert (found.dropna().filter(like="lora_a") == 0).all()
    assert (found.dropna().filter(like="lora_b") > 0).all()


def test_norms_are_those_of_the_gradients():
    model = toy_model()
    given = {name: mx.full(p.shape, 2.0) for name, p in tree_flatten(model.parameters())}
    found = gradient_norms(model, given)
    assert found["model.norm.weight"] == pytest.approx(2 * np.sqrt(given["model.norm.weight"].size))


# The heat map


def test_every_tensor_with_a_gradient_has_a_cell_and_every_frozen_module_a_grey_one(figures):
    whole, part = norms(toy_model()), norms(adapted())
    draw_gradients({"whole": whole, "adapter": part})
    unfrozen, with_adapter = (colors(panel(figures[0], at)) for at in (0, 1))
    assert len(unfrozen) == len(whole)
    assert to_rgba(FROZEN) not in unfrozen
    assert with_adapter.count(to_rgba(ZERO)) == (part == 0).sum() > 0
    lit = [c for c in with_adapter if c not in (to_rgba(ZERO), to_rgba(FROZEN))]
    assert len(lit) == (part > 0).sum()
    # Embedding, final norm, and two norms a layer: an adapted module is not frozen.
    assert with_adapter.count(to_rgba(FROZEN)) == 2 + 2 * 2


def test_cells_do_not_overlap(figures):
    draw_gradients({"adapter": norms(adapted())})
    boxes = [patch.get_bbox().extents for patch in panel(figures[0]).patches]
    for at, (left, top, right, bottom) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[at + 1 :]:
            assert x1 <= left or right <= x0 or y1 <= top or bottom <= y0


def test_titles_count_the_gradients(figures):
    part = norms(adapted())
    draw_gradients({"whole": norms(toy_model()), "adapter": part})
    reached, given = int((part > 0).sum()), int(part.notna().sum())
    assert figures[0].get_suptitle().endswith(f"reaches 20, then {reached} tensors")
    title = panel(figures[0], 1).get_title(loc="left")
    assert title == f"adapter: {given} of {len(part)} tensors, {given - reached} exactly 0"


def test_one_scale_serves_all_panels(figures):
    weak = norms(toy_model())
    draw_gradients({"weak": weak, "strong": 10 * weak, "weak again": weak})
    first, second, third = (colors(panel(figures[0], at)) for at in range(3))
    assert first == third != second


def test_a_larger_gradient_is_lighter(figures):
    rising = pd.Series({f"model.layers.{n}.mlp.up_proj.weight": 10.0**n for n in range(4)})
    draw_gradients({"rising": rising})
    lightness = [sum(color[:3]) for color in colors(panel(figures[0]))]
    assert lightness == sorted(lightness)
    assert len(set(lightness)) == 4


def test_an_untied_head_and_a_bias_have_places_of_their_own(figures):
    names = ["h.0.attn.q.weight", "h.0.attn.q.bias", "h.1.attn.q.weight", "lm_head.weight"]
    draw_gradients({"biased": pd.Series(1.0, index=names)})
    boxes = [patch.get_bbox().extents for patch in panel(figures[0]).patches]
    assert len(boxes) == 4
    weight, bias, _, head = boxes
    assert weight[0] == bias[0], "the same column"
    assert weight[3] <= bias[1], "one above the other"
    assert head[0] > boxes[2][2], "to the right of the layers"


@pytest.mark.parametrize(
    "panels", [{}, {"none": pd.Series({"w": np.nan})}, {"none": pd.Series({"w": 0.0})}]
)
def test_no_gradient_is_refused(panels):
    with pytest.raises(ConfigError, match="no gradient"):
        draw_gradients(panels)


# Slopes


def test_errors_are_shares_of_the_larger_slope():
    errors = slope_errors([2.0, -2.0, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0])
    assert errors.tolist() == [0.5, 2.0, 1.0, 0.0]


def test_the_finding_counts_the_slopes_that_agree(figures):
    measured = [1.0, -2.0, 3.0]
    draw_slopes(measured, {"right": [1.01, -2.0, 3.0], "wrong": [1.0, 2.0, 0.0]})
    said = figures[0].get_suptitle()
    assert said == "right: 3 of 3 slopes agree; wrong: 1 of 3 slopes agree"


def test_claims_are_drawn_against_what_was_measured_and_errors_from_the_steepest(figures):
    measured, claimed = [1.0, -8.0, 3.0], [1.1, -8.8, 6.0]
    draw_slopes(measured, {"claimed": claimed})
    left, right = figures[0].axes
    points = next(line for line in left.lines if line.get_label() == "claimed")
    assert np.array_equal(points.get_xydata(), np.transpose([measured, claimed]))
    errors = 100 * slope_errors(measured, claimed)
    drawn = next(line for line in right.lines if len(line.get_ydata()) == 3)
    assert drawn.get_ydata() == pytest.approx(errors[[1, 2, 0]])


@pytest.mark.parametrize(
    ("measured", "claims"), [([], {"a": []}), ([1.0], {}), ([1.0], {"a": [1.0, 2.0]})]
)
def test_no_slopes_are_refused(measured, claims):
    with pytest.raises(ConfigError, match="no slopes"):
        draw_slopes(measured, claims)


# What waits


def test_the_finding_names_the_worst_and_the_best_loop(figures):
    draw_pending({"bad": loop([10, 2000]), "right": loop([0, 0]), "middling": loop([5, 5])})
    said = figures[0].get_suptitle()
    assert said == "After 2 steps, 2,000 operations wait (bad), or 0 (right)"


def test_steps_count_from_one_and_memory_is_in_megabytes(figures):
    draw_pending({"bad": loop([10, 20, 30], [1e6, 2e6, 4e6])})
    left, right = figures[0].axes
    assert left.lines[0].get_xydata().tolist() == [[1, 10], [2, 20], [3, 30]]
    assert right.lines[0].get_ydata().tolist() == [1, 2, 4]


def test_a_last_evaluation_is_marked_where_something_waits_and_nowhere_else(figures):
    draw_pending({"bad": loop([1, 2], final=9e6), "right": loop([0, 0], final=7e6)})
    stars = [line for line in figures[0].axes[1].lines if line.get_marker() == "*"]
    assert [list(line.get_ydata()) for line in stars] == [[1, 9]]


def test_no_loop_is_left_out(figures):
    many = {f"loop {n}": loop([n, n]) for n in range(9)}
    draw_pending(many)
    assert len(figures[0].axes[0].lines) == len(many)


@pytest.mark.parametrize("loops", [{}, {"empty": loop([0]).head(0)}])
def test_no_steps_are_refused(loops):
    with pytest.raises(ConfigError, match="no steps"):
        draw_pending(loops)


# All of them


def test_every_picture_has_a_clear_ground_and_draws_names_as_they_are():
    odd = r"$\frac{$"
    names = [f"model.layers.0.{odd}.weight", f"{odd}.weight"]
    for png in (
        draw_gradients({odd: pd.Series([1.0, 2.0], index=names)}),
        draw_slopes([1.0, 2.0], {odd: [1.0, 2.0]}),
        draw_pending({odd: loop([1, 2])}),
    ):
        drawn = pixels(png)
        assert drawn[0, 0, 3] == 0
        assert drawn[..., 3].max() == 1, "something is drawn"
