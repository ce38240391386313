"""Clipping by the global norm."""

import math

import mlx.core as mx
import numpy as np
import pytest

from workbench.tuning.gradients import clip_by_global_norm


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_clipping_bounds_the_norm_and_keeps_the_direction(max_norm, dtype):
    gradients = {"a": mx.array([300.0, -400.0], dtype), "b": [mx.array([[0.0, 1.0]], dtype)]}
    clipped, norm = clip_by_global_norm(gradients, max_norm)
    assert norm.item() == pytest.approx(math.sqrt(250_001), rel=1e-3)
    after = clip_by_global_norm(clipped, 0)[1].item()
    assert after == pytest.approx(min(max_norm, norm.item()), rel=2e-2)
    assert clipped["a"].dtype == dtype
    assert (clipped["a"][0] / clipped["a"][1]).item() == pytest.approx(-0.75, rel=1e-2)


def test_zero_gradients_stay_zero():
    clipped, norm = clip_by_global_norm({"a": mx.zeros(3)}, 1.0)
    assert norm.item() == 0
    assert clipped["a"].tolist() == [0, 0, 0]


def test_sums_are_divided_by_the_tokens_before_they_are_clipped():
    gradients = {"a": mx.array([300.0, -400.0]), "b": mx.array([[0.0, 0.0]])}
    for max_norm, expected in ((0, [3.0, -4.0]), (10.0, [3.0, -4.0]), (2.5, [1.5, -2.0])):
        clipped, norm = clip_by_global_norm(gradients, max_norm, num_tokens=100)
        assert norm.item() == pytest.approx(5)
        assert clipped["a"].tolist() == pytest.approx(expected)


def test_the_norm_is_that_of_all_numbers_however_they_are_cut():
    shapes = [(700, 1000), (3,), (2**18,), (1, 2**18 + 7), (), (0, 4), (5, 20, 3)]
    gradients = [mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes)]
    squares = sum(float(np.square(np.array(g, np.float64)).sum()) for g in gradients)
    norm = clip_by_global_norm({"list": gradients}, 0)[1]
    assert norm.item() == pytest.approx(math.sqrt(squares), rel=1e-4)
