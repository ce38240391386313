"""NaN and infinity are found wherever they stand, and nothing else is taken for them."""

import mlx.core as mx
import numpy as np
import pytest

from workbench.numerics import not_finite

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 41, 11_999])
def test_one_bad_number_is_found(dtype, bad, place):
    numbers = np.ones(12_000, np.float32)
    numbers[place] = bad
    tree = {"good": mx.ones((3, 4), dtype), "bad": mx.array(numbers, dtype).reshape(100, 120)}
    assert not_finite(tree) == ["bad"]


def test_infinities_of_both_signs_are_found():
    assert not_finite({"both": mx.array([float("inf"), -float("inf")])}) == ["both"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("error")  # of NumPy, on overflow
def test_finite_numbers_whose_sum_is_not_are_let_pass(dtype):
    assert not_finite({"large": mx.full((300,), mx.finfo(dtype).max, dtype)}) == []


def test_views_scalars_integers_and_what_is_not_yet_computed_are_read():
    whole = mx.arange(12.0).reshape(3, 4)
    whole[1, 2] = float("nan")
    tree = {
        "column": whole[:, 2],
        "beside it": whole[:, 1],
        "turned": whole.T,
        "scalar": mx.array(float("inf")),
        "whole number": mx.array(3),
        "empty": mx.zeros((0, 4)),
        "lazy": mx.log(mx.array(-1.0)),
    }
    assert not_finite(tree) == ["column", "turned", "scalar", "lazy"]
