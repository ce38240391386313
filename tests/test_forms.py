"""The fast forms of attention and SwiGLU give what the readable ones give, and so do gradients."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from tests.toy import toy_base, toy_model
from workbench.models import forms
from workbench.models.forms import (
    attend,
    exponential,
    is_fast,
    keeps_probabilities,
    plain_forms,
    silu_product,
)

only_fast = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device().type != mx.cpu,
    reason="MLX has kernels of its own here: there is one form only",
)
SHAPES = {  # B, H, KV, T, S, D
    "one block": (2, 4, 2, 5, 5, 8),
    "a block and a bit": (1, 6, 3, 65, 65, 4),
    "whole blocks": (1, 2, 2, 128, 128, 8),
    "one key/value head": (3, 4, 1, 70, 70, 8),
    "after others": (2, 4, 2, 70, 100, 8),
    "one position after others": (1, 4, 2, 1, 77, 8),
}


def inputs(name: str, size: float = 1.0) -> list[mx.array]:
    B, H, KV, T, S, D = SHAPES[name]
    keys = mx.random.split(mx.random.key(7), 4)
    shapes = [(B, H, T, D), (B, KV, S, D), (B, KV, S, D), (B, H, T, D)]
    return [size * mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys)]


def both(function, arrays, flow) -> tuple[list, list]:
    """Output and gradients, of the fast form and of the plain one."""
    results = []
    for form in (None, plain_forms):
        with plain_forms() if form else mx.stream(mx.default_device()):
            outputs, gradients = mx.vjp(function, arrays, [flow])
            results.append([np.array(array) for array in [*outputs, *gradients]])
    return results[0], results[1]


def assert_close(ours, theirs, tolerance=1e-5):
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * max(1e-3, np.abs(other).max())


@only_fast
@pytest.mark.parametrize("size", [1.0, 8.0])  # 8: scores of hundreds, most chances vanish
@pytest.mark.parametrize("name", SHAPES)
def test_attention_and_its_gradients_are_those_of_the_plain_form(name, size):
    *arrays, flow = inputs(name, size)
    scale = arrays[0].shape[-1] ** -0.5
    ours, theirs = both(lambda q, k, v: attend(q, k, v, scale, "causal"), arrays, flow)
    assert_close(ours, theirs)


@only_fast
@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("name", SHAPES)
def test_probabilities_that_are_computed_again_give_the_same_gradients(name, size, monkeypatch):
    *arrays, flow = inputs(name, size)
    scale = arrays[0].shape[-1] ** -0.5
    monkeypatch.setattr(forms, "KEPT_BYTES", 0)
    ours, theirs = both(lambda q, k, v: attend(q, k, v, scale, "causal"), arrays, flow)
    assert_close(ours, theirs)


def test_probabilities_of_short_sequences_are_kept():
    assert keeps_probabilities((4, 9, 256, 64), (4, 3, 256, 64))
    assert keeps_probabilities((8, 9, 1, 64), (8, 3, 8192, 64))
    assert not keeps_probabilities((1, 9, 2048, 64), (1, 3, 2048, 64))


@only_fast
def test_a_long_sequence_holds_a_few_blocks_of_probabilities_at_a_time():
    shape = (1, 4, 2500, 16)
    arrays = [mx.random.normal(shape, key=key) for key in mx.random.split(mx.random.key(1), 3)]
    mx.eval(arrays)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gradient = mx.grad(lambda q, k, v: attend(q, k, v, 0.25, "causal").sum(), (0, 1, 2))
    mx.eval(gradient(*arrays))
    assert not keeps_probabilities(shape, shape)
    whole = 4 * 4 * 2500 * 2500 / 2  # of which the largest block is a twentieth
    assert mx.get_peak_memory() - before < 0.6 * whole  # 1.9 if they are kept


@only_fast
def test_the_fast_form_is_another():
    # Or the tests above compare the plain form with itself.
    *arrays, flow = inputs("a block and a bit")
    ours, theirs = both(lambda q, k, v: attend(q, k, v, 0.5, "causal"), arrays, flow)
    assert any((one != other).any() for one, other in zip(ours, theirs))


@only_fast
def test_what_comes_later_does_not_reach_attention_in_the_last_bit():
    queries, keys, values, _ = inputs("a block and a bit")
    before = attend(queries, keys, values, 0.5, "causal")
    later = mx.arange(65)[None, None, :, None] >= 30
    changed = [mx.where(later, 1e6, array) for array in (keys, values)]
    after = attend(queries, *changed, 0.5, "causal")
    assert mx.array_equal(before[:, :, :30], after[:, :, :30])
    assert not mx.array_equal(before[:, :, 30:], after[:, :, 30:])


@only_fast
@pytest.mark.parametrize("size", [1.0, 50.0])  # 50: beyond what float32 holds of e to the power
def test_swiglu_and_its_gradients_are_those_of_the_plain_form(size):
    keys = mx.random.split(mx.random.key(3), 3)
    gate, up, flow = (size * mx.random.normal((5, 40), key=key) for key in keys)
    assert_close(*both(silu_product, [gate, up], flow))


@only_fast
def test_exponentials_are_right_to_float32():
    x = mx.linspace(-80, 80, 10_001)
    exact = np.exp(np.array(x, dtype=np.float64))
    error = np.abs(np.array(exponential(x), dtype=np.float64) / exact - 1)
    assert (error <= 1.2e-7 * np.maximum(1, np.abs(np.array(x)))).all()
    assert exponential(mx.array([-1e9, 1e9])).tolist() == [0.0, float("inf")]


@only_fast
def test_exponentials_of_a_large_unit_are_rounded_once():
    x = mx.linspace(-80, 80, 10_001)
    exact = np.exp(np.array(x, dtype=np.float64))
    error = np.abs(np.array(exponential(x / 64, unit=64.0), dtype=np.float64) / exact - 1)
    assert error.max() <= 2.5e-7
    assert exponential(mx.array([-1e9, 1e9]), unit=64.0).tolist() == [0.0, float("inf")]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_dtypes_take_the_plain_form(dtype):
    *arrays, _ = (array.astype(dtype) for array in inputs("one block"))
    ours = attend(*arrays, 0.5, "causal")
    with plain_forms():
        assert mx.array_equal(ours, attend(*arrays, 0.5, "causal"))
    assert not is_fast(*arrays)


def test_the_switch_goes_back_whatever_happens():
    before = is_fast(mx.zeros(1))
    with plain_forms(), plain_forms():
        assert not is_fast(mx.zeros(1))
    with pytest.raises(ZeroDivisionError), plain_forms():
        raise ZeroDivisionError
    assert is_fast(mx.zeros(1)) == before
    assert not forms._plain


@only_fast
@pytest.mark.parametrize("length", [3, 64, 130])
def test_a_whole_network_is_the_same_in_both_forms(length):
    model = toy_model(0)
    tokens = mx.random.randint(0, 50, (2, length), key=mx.random.key(2))
    ours = model(tokens)
    with plain_forms():
        theirs = model(tokens)
    assert_close([np.array(ours)], [np.array(theirs)])


@pytest.mark.real
@only_fast
def test_the_real_network_is_the_same_in_both_forms(smollm2):
    tokens = mx.array([smollm2.tokenizer.encode("The capital of Peru is Lima. " * 20)])
    ours = smollm2.model(tokens)
    with plain_forms():
        theirs = smollm2.model(tokens)
    assert mx.abs(ours - theirs).max().item() <= 1e-4 * mx.abs(theirs).max().item()


def test_toy_weights_are_float32():
    assert is_fast(toy_base().model.model.norm.weight) == is_fast(mx.zeros(1))
