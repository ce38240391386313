"""The plan's picture of MLX: what small programs hold at their fullest, here and there."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest

from workbench.probes.planning.arrays import FLOAT32
from workbench.probes.planning.derivatives import gradients
from workbench.probes.planning.graph import Graph
from workbench.probes.planning.schedule import evaluation_order, fullest_moment

SIZE = 384  # rows and columns: 0.6 MB an array, so that MLX's thread is busy


class Real:
    """The same operations on real arrays."""

    def weight(self):
        """An evaluated matrix."""
        array = mx.random.normal((SIZE, SIZE), key=mx.random.key(0))
        mx.eval(array)
        return array

    square, sigmoid = staticmethod(mx.square), staticmethod(mx.sigmoid)
    add, matmul = staticmethod(mx.add), staticmethod(mx.matmul)
    multiply = staticmethod(mx.multiply)
    softmax = staticmethod(lambda x: mx.softmax(x, axis=-1))
    turned = staticmethod(mx.transpose)


class Planned:
    """The same operations on shapes."""

    def __init__(self):
        self.graph = Graph("arrays")
        self.add, self.matmul = self.graph.add, self.graph.matmul
        self.multiply, self.turned = self.graph.multiply, self.graph.swap_last

    def weight(self):
        """A held matrix, trainable."""
        return self.graph.held((SIZE, SIZE), FLOAT32, "weights", trains=True)

    def square(self, x):
        """x²."""
        return self.graph.unary("Square", x)

    def sigmoid(self, x):
        """1 / (1 + e⁻ˣ)."""
        return self.graph.unary("Sigmoid", x)

    def softmax(self, x):
        """Over the last axis."""
        return self.graph.unary("Softmax", x)


def chain(ops, x):
    for _ in range(12):
        x = ops.sigmoid(ops.square(x))
    return x


def fan(ops, x):
    parts = [ops.sigmoid(x) for _ in range(30)]
    total = parts[0]
    for part in parts[1:]:
        total = ops.add(total, part)
    return total


def products(ops, x):
    for _ in range(8):
        x = ops.matmul(x, ops.turned(ops.sigmoid(x)))
    return x


def kept(ops, x):
    whole = x
    for _ in range(6):
        x = ops.softmax(ops.matmul(x, x))
        whole = ops.multiply(whole, x)
    return ops.add(whole, x)


def many(ops, x):
    x = ops.sigmoid(x)
    for _ in range(60):
        x = ops.add(ops.square(x), ops.turned(ops.sigmoid(x)))
    return x


PROGRAMS = [chain, fan, products, kept, many]


def measured(evaluate) -> int:
    """Most bytes in arrays while something is evaluated, without those that were there.

    The largest of three times: a main thread that has to wait for a core runs less far ahead.
    """
    peaks = []
    for _ in range(3):
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        evaluate()
        peaks.append(mx.get_peak_memory() - before)
    return max(peaks)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_holds_what_is_planned(program):
    x, ops = Real().weight(), Planned()
    peak = measured(lambda: mx.eval(program(Real(), x)))
    planned = fullest_moment([program(ops, ops.weight())], {}).total_bytes
    assert planned == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("program", PROGRAMS)
def test_its_gradient_holds_what_is_planned(program):
    x, ops = Real().weight(), Planned()
    real = mx.value_and_grad(lambda x: program(Real(), x).sum())
    peak = measured(lambda: mx.eval(real(x)))
    weight = ops.weight()
    output = program(ops, weight)
    loss = ops.graph.fresh("Sum", (), FLOAT32, output)
    flow = ops.graph.scalar(output.shape)
    outputs = [loss, *gradients(ops.graph, output, [weight], flow)]
    assert fullest_moment(outputs, {}).total_bytes == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_array_comes_after_its_inputs_and_once(program):
    ops = Planned()
    weight = ops.weight()
    output = program(ops, weight)
    order = evaluation_order([output])
    done = {id(weight)}
    for array in order:
        assert all(id(source) in done for source in array.inputs)
        assert id(array) not in done
        done.add(id(array))
    assert len(order) == len(ops.graph.arrays)


def test_views_hold_nothing():
    ops = Planned()
    x = ops.weight()
    for _ in range(5):
        x = ops.turned(x)
    assert fullest_moment([x], {"weights": 7}).parts == {"weights": 7}


def test_running_ahead_costs_memory():
    peaks = []
    for ahead in (0, 1, 5, 10):
        ops = Planned()
        peaks.append(fullest_moment([many(ops, ops.weight())], {}, ahead).total_bytes)
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]
