"""The update in blocks is that of MLX's optimizer to the bit, and holds no more than a block."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from workbench.blocks import grouped, in_rows, joined, parted, rows_in_block
from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.steps import update_moment
from workbench.tuning.blocks import Blockwise
from workbench.tuning.config import TrainConfig
from workbench.tuning.optimizers import make_optimizer

LIMIT = 64  # numbers in a block
MEGA = 2**20
SHAPES = {
    "scalar": (),
    "one": (1,),
    "empty": (0, 5),
    "small": (3, 5),
    "exactly": (LIMIT,),
    "exactly_rows": (8, 8),
    "one_more": (LIMIT + 1,),
    "cut": (29, 7),
    "long_rows": (2, 3 * LIMIT),
    "experts": (3, 11, 6),
}


def mixed_tree(seed=0):
    """Arrays of every shape in three types, the gradient of one type wider than its parameter."""
    mx.random.seed(seed)
    tree = {
        str(dtype).removeprefix("mlx.core."): [
            {name: mx.random.normal(shape).astype(dtype) for name, shape in SHAPES.items()}
        ]
        for dtype in (mx.float32, mx.bfloat16, mx.float16)
    }
    mx.eval(tree)
    return tree


def mixed_gradients(seed):
    """For `mixed_tree`; some lie column by column."""
    gradients = tree_map(lambda g: g * 0.1, mixed_tree(seed))
    gradients["float32"][0]["cut"] = mx.random.normal(SHAPES["cut"][::-1]).T
    gradients["bfloat16"][0]["cut"] = mx.random.normal(SHAPES["cut"])  # float32
    return gradients


class PlainAdamW(optim.AdamW):
    """MLX's own, array by array, as `make_optimizer` sets it up."""

    def __init__(self, config):
        betas = list(config.adam_betas)
        super().__init__(0.0, betas, config.adam_epsilon, config.weight_decay, True)


class BlockwiseLion(Blockwise, optim.Lion):
    """Another rule for single numbers."""


class BlockwiseAdafactor(Blockwise, optim.Adafactor):
    """No rule for single numbers."""


def bits(tree):
    """Types, shapes and bytes by name."""
    return {
        name: (array.dtype, array.shape, np.array(array.reshape(-1).view(mx.uint8)).tobytes())
        for name, array in tree_flatten(tree)
        if array.size
    }


def train(optimizer, weights, steps=range(4)):
    """Weights after some updates, each with a rate of its own."""
    optimizer.init(weights)
    for step in steps:
        optimizer.learning_rate = 0.01 / (1 + step)
        weights = optimizer.apply_gradients(mixed_gradients(step + 1), weights)
        mx.eval(weights, optimizer.state)
    return weights


def in_blocks_of(limit, optimizer=None):
    optimizer = optimizer or make_optimizer(TrainConfig(weight_decay=0.1))
    optimizer.block_numbers = limit
    return optimizer


@pytest.mark.parametrize("limit", [1, 7, LIMIT, 10**6, None])
def test_weights_and_state_are_equal_to_the_bit(limit):
    plain, blocks = PlainAdamW(TrainConfig(weight_decay=0.1)), in_blocks_of(limit)
    expected, found = train(plain, mixed_tree()), train(blocks, mixed_tree())
    assert bits(found) == bits(expected) != bits(mixed_tree())
    assert bits(blocks.state) == bits(plain.state)
    assert dict(tree_flatten(found)).keys() == dict(tree_flatten(expected)).keys()
    assert found["float32"][0]["empty"].shape == SHAPES["empty"]
    assert blocks.step.item() == 4


def test_real_sizes_are_equal_to_the_bit():
    mx.random.seed(0)
    weights = {f"w{n}": mx.random.normal(s) for n, s in enumerate([(700, 999), (8, 576), (576,)])}
    gradients = tree_map(lambda w: mx.random.normal(w.shape), weights)
    plain, blocks = PlainAdamW(TrainConfig()), make_optimizer(TrainConfig())
    plain.learning_rate = blocks.learning_rate = 1e-3
    found = expected = weights
    for _ in range(3):
        expected = plain.apply_gradients(gradients, expected)
        found = blocks.apply_gradients(gradients, found)
    assert bits(found) == bits(expected)
    assert bits(blocks.state) == bits(plain.state)


@pytest.mark.parametrize("first", ["plain", "blocks"])
def test_the_state_of_one_goes_on_in_the_other(first):
    whole = PlainAdamW(TrainConfig(weight_decay=0.1))
    expected = train(whole, mixed_tree())
    pair = [PlainAdamW(TrainConfig(weight_decay=0.1)), in_blocks_of(LIMIT)]
    before, after = pair if first == "plain" else pair[::-1]
    weights = train(before, mixed_tree(), range(2))
    after.state = before.state
    assert bits(train(after, weights, range(2, 4))) == bits(expected)
    assert bits(after.state) == bits(whole.state)


def test_other_rules_and_schedules_work_alike():
    def falling(step):
        return 0.01 / (1 + step)

    plain, blocks = optim.Lion(falling), in_blocks_of(LIMIT, BlockwiseLion(falling))
    expected = found = mixed_tree()
    for step in range(3):
        expected = plain.apply_gradients(mixed_gradients(step), expected)
        found = blocks.apply_gradients(mixed_gradients(step), found)
    assert bits(found) == bits(expected)
    assert bits(blocks.state) == bits(plain.state)


def test_a_rule_that_looks_at_rows_is_refused():
    with pytest.raises(AssertionError, match="not by single numbers"):
        BlockwiseAdafactor().apply_gradients({"w": mx.ones((4, 3))}, {"w": mx.ones((4, 3))})


def test_what_gets_no_gradient_stays_out():
    optimizer = in_blocks_of(LIMIT)
    optimizer.learning_rate = 0.1
    found = optimizer.apply_gradients({"a": mx.ones(3)}, {"a": mx.ones(3), "b": mx.ones(2)})
    assert list(found) == ["a"]
    assert optimizer.apply_gradients({}, {"b": mx.ones(2)}) == {}


def test_small_arrays_share_the_operations_of_a_block():
    optimizer, calls = in_blocks_of(1000), []
    rule = optimizer.apply_single
    optimizer.apply_single = lambda *a: calls.append(a[0].size) or rule(*a)
    tree = {"w": [mx.ones(10), mx.ones((2, 5))] * 125}
    optimizer.apply_gradients(tree, tree)
    assert calls == [1000, 1000, 500]


# Memory


def arrays_of(*sizes):
    tree = {f"w{n}": mx.random.normal((size // 64, 64)) for n, size in enumerate(sizes)}
    mx.eval(tree)
    return tree


@pytest.mark.parametrize("sizes", [[4 * MEGA], [2**13] * 512])
def test_beside_old_and_new_there_is_one_block(sizes):
    limit = 2**16
    optimizer, weights, gradients = in_blocks_of(limit), arrays_of(*sizes), arrays_of(*sizes)
    optimizer.init(weights)
    old = tree_map(lambda x: x, optimizer.state)
    mx.eval(old)
    gc.collect()
    before, _ = mx.get_active_memory(), mx.reset_peak_memory()
    new = optimizer.apply_gradients(gradients, weights)
    mx.eval(new, optimizer.state)
    grown = mx.get_peak_memory() - before
    assert 3 * 4 * sum(sizes) <= grown <= 3 * 4 * sum(sizes) + 16 * 4 * limit
    shapes = [ShapeArray("held", (), array.shape, FLOAT32) for array in weights.values()]
    parameters = SimpleNamespace(trainable=shapes, gradient=lambda array: array)
    plan = update_moment(parameters, "adamw", {}, limit)
    assert plan.total_bytes == pytest.approx(grown, rel=0.03)
    assert all(array.size for _, array in tree_flatten(old))  # the old state was held all the time


def test_a_part_that_stays_keeps_one_block_only():
    optimizer = in_blocks_of(2**14)
    gc.collect()
    before = mx.get_active_memory()
    weights = optimizer.apply_gradients(arrays_of(*[2**10] * 256), arrays_of(*[2**10] * 256))
    mx.eval(weights, optimizer.state)
    kept = weights["w7"]
    del weights
    optimizer.state = {}
    gc.collect()
    assert kept.nbytes <= mx.get_active_memory() - before <= 4 * 2**14 + 1000


# Blocks


def test_groups_are_full_of_one_kind_and_in_order():
    items = [("a", 3), ("b", 1), ("a", 4), ("a", 9), ("b", 2), ("a", 7), ("a", 1), ("c", 0)]
    groups = list(grouped(items, lambda item: item[0], lambda item: item[1], 7))
    assert sorted(groups) == [
        [("a", 1)],
        [("a", 3), ("a", 4)],
        [("a", 7)],
        [("a", 9)],
        [("b", 1), ("b", 2)],
        [("c", 0)],
    ]
    assert list(grouped([], id, id, 7)) == []


@pytest.mark.parametrize("names", [list(SHAPES), ["scalar"], ["empty", "scalar"], ["experts"]])
def test_parting_undoes_joining(names):
    arrays = [mx.random.normal(SHAPES[name]) for name in names]
    back = parted(joined(arrays), [array.shape for array in arrays])
    assert [array.shape for array in back] == [array.shape for array in arrays]
    assert all(mx.array_equal(a, b) for a, b in zip(arrays, back))


def test_rows_are_cut_to_the_limit():
    assert [in_rows(mx.zeros(s)).shape for s in ((5,), (2, 3), (2, 3, 4))] == [(5,), (2, 3), (6, 4)]
    assert rows_in_block(10, 100, 35) == 3
    assert rows_in_block(10, 100, 5) == 1
