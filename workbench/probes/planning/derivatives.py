"""The backward pass: for each operation, the operations of MLX's own derivative.

Written after `vjp` of the primitives in MLX 0.32: what a derivative reads stays in memory from the
forward pass until then, and that is most of a training step's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from workbench.probes.planning.arrays import ShapeArray
from workbench.probes.planning.graph import Graph

Flow = Iterator[tuple[ShapeArray, ShapeArray]]  # (input, its gradient)


def gradients(
    graph: Graph,
    loss: ShapeArray,
    wanted: Sequence[ShapeArray],
    cotangent: ShapeArray | None = None,
) -> list[ShapeArray]:
    """Add the backward pass to the graph; returns a gradient for each array in `wanted`.

    It is of zeros for an array that the loss does not depend on.
    """
    flows: dict[int, ShapeArray] = {id(loss): cotangent or graph.scalar(loss.shape, loss.itemsize)}
    label = graph.label
    for array in reversed(_ancestors(loss, wanted)):
        flow = flows.pop(id(array), None)
        if flow is None:
            continue
        graph.label = array.label
        for source, gradient in DERIVATIVES[array.op](graph, array, flow):
            if source.trains:
                before = flows.get(id(source))
                flows[id(source)] = graph.add(before, gradient) if before else gradient
    graph.label = label
    return [flows.get(id(a)) or graph.zeros(a.shape, a.itemsize) for a in wanted]


def _ancestors(loss: ShapeArray, wanted: Sequence[ShapeArray]) -> list[ShapeArray]:
    """Arrays between `wanted` and the loss that pass a gradient on, each after its inputs."""
    order, seen = [], {id(array) for array in wanted}
    stack = [(loss, iter(loss.inputs))]
    seen.add(id(loss))
    while stack:
        array, inputs = stack[-1]
        for source in inputs:
            if source.trains and id(source) not in seen:
                seen.add(id(source))
                stack.append((source, iter(source.inputs)))
                break
        else:
            order.append(array)
            stack.pop()
    return order


def _multiply(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    a, b = array.inputs
    for this, other in ((a, b), (b, a)):
        if this.trains:
            yield this, graph.multiply(other, flow)


def _add(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    for source in array.inputs:
        yield source, flow


def _subtract(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    a, b = array.inputs
    yield a, flow
    if b.trains:
        yield b, graph.unary("Negative", flow)


def _square(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    yield x, graph.multiply(x, graph.multiply(graph.scalar(x.shape, x.itemsize), flow))


def _rsqrt(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    half = graph.multiply(graph.scalar(x.shape, x.itemsize), flow)
    yield x, graph.multiply(half, graph.binary("Divide", array, x))


def _sigmoid(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    rest = graph.subtract(graph.scalar(array.shape, array.itemsize), array)
    yield array.inputs[0], graph.multiply(flow, graph.multiply(array, rest))


def _softmax(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    weighted = graph.multiply(array, flow)
    total = graph.broadcast(graph.sum_last(weighted), array.shape)
    yield array.inputs[0], graph.subtract(weighted, graph.multiply(array, total))


def _select(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    mask, x, _ = array.inputs
    yield x, graph.multiply(graph.unary("AsType", mask, x.itemsize), flow)


def _log_sum_exp(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    probabilities = graph.unary("Softmax", x)
    yield x, graph.multiply(graph.broadcast(flow, x.shape), probabilities)


def _gather_axis(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    x, indices = array.inputs
    zeros = graph.zeros(x.shape, x.itemsize)
    yield x, graph.fresh("ScatterAxis", x.shape, x.itemsize, zeros, indices, flow, donors=(zeros,))


def _gather(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    x, indices = array.inputs
    zeros = graph.zeros(x.shape, x.itemsize)
    yield x, graph.fresh("Scatter", x.shape, x.itemsize, zeros, indices, flow, donors=(zeros,))


def _sum(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    yield x, graph.broadcast(flow, x.shape)


def _broadcast(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    yield x, graph.fresh("Sum", x.shape, flow.itemsize, flow)


def _transpose(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    back = sorted(range(len(array.options)), key=lambda i: array.options[i])
    yield array.inputs[0], graph.transpose(flow, *back)


def _reshape(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    yield x, graph.reshape(flow, x.shape)


def _slice(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    zeros = graph.zeros(x.shape, x.itemsize)
    yield x, graph.fresh("SliceUpdate", x.shape, x.itemsize, zeros, flow, donors=(zeros,))


def _concatenate(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (axis,) = array.options
    for part in array.inputs:
        yield part, graph.slice(flow, axis, part.shape[axis])


def _matmul(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    a, b = array.inputs
    if a.trains:
        yield a, graph.matmul(flow, graph.swap_last(b))
    if b.trains:
        yield b, graph.matmul(graph.swap_last(a), flow)


def _quantized_matmul(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    x, weight = array.inputs
    yield x, graph.fresh("QuantizedMatmul", x.shape, x.itemsize, flow, weight)


def _cast(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (x,) = array.inputs
    yield x, graph.cast(flow, x.itemsize)


def _fused_norm(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    x, weight = array.inputs
    made = graph.fresh("RMSNormVJP", x.shape, x.itemsize, x, weight, flow)
    made.temporary = x.nbytes if weight.trains else 0  # the weight's gradient, before its sum
    yield x, made
    if weight.trains:
        yield weight, graph.fresh("RMSNormVJP", weight.shape, weight.itemsize, x, weight, flow)


def _fused_rope(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    yield array.inputs[0], graph.fresh("RoPE", array.shape, array.itemsize, flow)


def _fused_cross_entropy(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    logits, targets = array.inputs
    yield logits, graph.fresh("CrossEntropyVJP", logits.shape, 4, logits, targets, flow)


def _custom(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    (derivative,) = array.options
    yield from derivative(graph, array, flow)


def _same(graph: Graph, array: ShapeArray, flow: ShapeArray) -> Flow:
    yield array.inputs[-1], flow


DERIVATIVES: dict[str, Callable[[Graph, ShapeArray, ShapeArray], Flow]] = {
    "Multiply": _multiply,
    "Add": _add,
    "Subtract": _subtract,
    "Square": _square,
    "Rsqrt": _rsqrt,
    "Sigmoid": _sigmoid,
    "Softmax": _softmax,
    "Select": _select,
    "LogSumExp": _log_sum_exp,
    "GatherAxis": _gather_axis,
    "Gather": _gather,
    "Sum": _sum,
    "Broadcast": _broadcast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Slice": _slice,
    "Concatenate": _concatenate,
    "Matmul": _matmul,
    "QuantizedMatmul": _quantized_matmul,
    "AsType": _cast,
    "RMSNorm": _fused_norm,
    "RoPE": _fused_rope,
    "CrossEntropy": _fused_cross_entropy,
    "Custom": _custom,
    "Squeeze": _same,
}
