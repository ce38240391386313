"""Memory, fingerprints, numbers that went wrong."""

import math

import mlx.core as mx
import mlx.nn as nn
import pytest

import workbench as wb
from tests.toy import toy_model
from workbench.numerics import not_finite
from workbench.probes.memory import read_memory
from workbench.probes.parameters import changed, fingerprint

SIZE = 40_000_000  # bytes


def test_memory_shows_an_array_while_it_lives():
    before = read_memory()
    array = mx.zeros(SIZE // 4) + 1
    mx.eval(array)
    during = read_memory()
    del array
    after = read_memory()
    assert during.active_bytes - before.active_bytes >= SIZE
    assert after.active_bytes - before.active_bytes < SIZE // 10
    assert after.peak_bytes >= during.active_bytes
    assert during.process_bytes > SIZE


def test_memory_shows_what_the_allocator_keeps():
    previous = mx.set_cache_limit(2 * SIZE)
    try:
        mx.clear_cache()
        assert read_memory().cache_bytes == 0
        mx.eval(mx.zeros(SIZE // 4) + 1)
        assert read_memory().cache_bytes >= SIZE
    finally:
        mx.set_cache_limit(previous)
        mx.clear_cache()


def test_equal_models_have_equal_fingerprints():
    assert fingerprint(toy_model()) == fingerprint(toy_model())
    assert changed(fingerprint(toy_model()), fingerprint(toy_model())) == []


def test_one_flipped_bit_is_named():
    model, before = toy_model(), fingerprint(toy_model())
    weight = model.layers[1].mlp.up_proj.weight
    flipped = weight.view(mx.uint32)
    flipped[3, 4] = flipped[3, 4] ^ 1
    model.layers[1].mlp.up_proj.weight = flipped.view(mx.float32)
    assert wb.changed(before, wb.fingerprint(model)) == ["model.layers.1.mlp.up_proj.weight"]


def test_dtype_shape_and_presence_count():
    def of(array):
        holder = nn.Module()
        holder.x = array
        return fingerprint(holder)

    zeros = of(mx.zeros((2, 3)))
    assert changed(zeros, of(mx.zeros((3, 2)))) == ["x"]
    assert changed(zeros, of(mx.zeros((2, 3), mx.int32))) == ["x"]
    assert changed(zeros, {}) == changed({}, zeros) == ["x"]
    assert changed(of(mx.zeros(3)), of(mx.array([0.0, -0.0, 0.0]))) == ["x"]


@pytest.mark.parametrize(
    "array",
    [
        mx.array(1.5),
        mx.array(True),
        mx.zeros((0, 3)),
        mx.ones((2, 3), mx.bfloat16),
        mx.arange(6).reshape(2, 3).T,
        mx.ones((4,), mx.complex64),
    ],
    ids=["scalar", "bool", "empty", "bfloat16", "transposed", "complex"],
)
def test_every_kind_of_array_has_a_fingerprint(array):
    one, other = nn.Module(), nn.Module()
    one.x, other.x = array, mx.contiguous(array)
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_went_wrong_are_named(value):
    tree = {"good": mx.ones(3), "layers": [{"w": mx.array([1.0, value])}, {"w": mx.ones(2)}]}
    assert not_finite(tree) == ["layers.0.w"]


def test_whole_numbers_and_the_largest_floats_are_finite():
    assert not_finite({"ids": mx.array([1, 2]), "large": mx.array([3.4e38])}) == []
    assert not_finite({}) == []
