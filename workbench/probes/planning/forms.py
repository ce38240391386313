"""Attention and SwiGLU on shapes, as `models/forms.py` makes MLX record them on a Linux CPU."""

from __future__ import annotations

from workbench.models.forms import QUERIES
from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.derivatives import Flow
from workbench.probes.planning.graph import Graph

ATTENTION = "attention"
MOST_BLOCKS = 32  # that are planned: of longer rows fewer, larger ones, which keep 2 % more


def silu_product(graph: Graph, gate: ShapeArray, up: ShapeArray) -> ShapeArray:
    """silu(gate) · up; keeps sigmoid(gate)."""
    one = graph.scalar(gate.shape)
    power = graph.binary("Power", one, graph.unary("Negative", gate))
    sigmoid = graph.binary("Divide", one, graph.add(one, power))
    product = graph.multiply(graph.multiply(gate, sigmoid), up)

    def derivative(graph: Graph, product: ShapeArray, flow: ShapeArray) -> Flow:
        (kept,) = product.siblings
        silu = graph.multiply(gate, kept)
        rest = graph.subtract(graph.scalar(kept.shape), kept)
        slope = graph.add(kept, graph.multiply(silu, rest))
        yield gate, graph.multiply(graph.multiply(flow, up), slope)
        yield up, graph.multiply(flow, silu)

    return graph.custom((gate, up), (product, sigmoid), derivative)[0]


def causal_attention(
    graph: Graph, queries: ShapeArray, keys: ShapeArray, values: ShapeArray
) -> ShapeArray:
    """Queries (B, H, T, D), keys and values (B, KV, T, D) → (B, H, T, D); keeps probabilities."""
    grouped, attended, kept = _grouped(graph, queries, keys), [], []
    for start, end in _blocks(queries.shape[2]):
        rows = graph.times(_rows(graph, _part(graph, grouped, end - start)))
        seen = graph.swap_last(graph.slice(keys, 2, end))
        kept.append(_probabilities(graph, rows, seen, grouped))
        product = graph.matmul(_rows(graph, kept[-1]), graph.slice(values, 2, end))
        attended.append(_split(graph, product, grouped))
    whole = graph.reshape(graph.concatenate(attended, 3), queries.shape)

    def derivative(graph: Graph, whole: ShapeArray, flow: ShapeArray) -> Flow:
        return _attention_gradients(graph, (queries, keys, values), whole, flow)

    return graph.custom((queries, keys, values), (whole, *kept), derivative)[0]


def _probabilities(
    graph: Graph, rows: ShapeArray, seen: ShapeArray, grouped: ShapeArray
) -> ShapeArray:
    """Of a block: (B, KV, R, positions, keys seen)."""
    label, graph.label = graph.label, ATTENTION
    scores = _split(graph, graph.matmul(rows, seen), grouped)
    square, low = scores.shape[-2:], graph.scalar(scores.shape)
    visible = graph.visible(*square)
    scalars = graph.scalar(square), graph.scalar(square)
    bound = graph.fresh("Select", square, FLOAT32, visible, *scalars)
    scores = graph.spread("Minimum", scores, bound)
    highest = graph.fresh("Max", (*scores.shape[:-1], 1), FLOAT32, scores)
    scores = graph.binary("Maximum", graph.spread("Subtract", scores, highest), low)
    power = graph.binary("Power", graph.scalar(scores.shape), scores)
    weights = graph.spread("Multiply", power, graph.cast(visible, FLOAT32))
    total = graph.sum_last(weights)
    share = graph.binary("Divide", graph.scalar(total.shape), total)
    probabilities = graph.spread("Multiply", weights, share)
    graph.label = label
    return probabilities


def _attention_gradients(
    graph: Graph, inputs: tuple[ShapeArray, ...], whole: ShapeArray, flow: ShapeArray
) -> Flow:
    queries, keys, values = inputs
    grouped, flow = _grouped(graph, queries, keys), _grouped(graph, flow, keys)
    row_sums = graph.sum_last(graph.multiply(flow, _grouped(graph, whole, keys)))
    by_queries, by_keys, by_values = [], None, None
    for chances in whole.siblings:
        size, seen = chances.shape[-2:]
        rows = _rows(graph, _part(graph, grouped, size))
        pulled = _rows(graph, _part(graph, flow, size))
        slopes = graph.matmul(pulled, graph.swap_last(graph.slice(values, 2, seen)))
        slopes = _split(graph, slopes, grouped)
        less = graph.spread("Subtract", slopes, _part(graph, row_sums, size))
        slopes = _rows(graph, graph.multiply(chances, less))
        product = graph.matmul(slopes, graph.slice(keys, 2, seen))
        by_queries.append(_split(graph, product, grouped))
        by_keys = _added(graph, by_keys, graph.matmul(graph.swap_last(slopes), rows))
        turned = graph.swap_last(_rows(graph, chances))
        by_values = _added(graph, by_values, graph.matmul(turned, pulled))
    by_queries = graph.reshape(graph.concatenate(by_queries, 3), queries.shape)
    yield queries, graph.times(by_queries)
    yield keys, graph.times(by_keys)
    yield values, by_values


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(QUERIES, -(-length // MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _part(graph: Graph, x: ShapeArray, size: int) -> ShapeArray:
    return graph.slice(x, 3, size)


def _grouped(graph: Graph, x: ShapeArray, keys: ShapeArray) -> ShapeArray:
    """(B, H, T, D) → (B, KV, R, T, D)."""
    B, H, T, D = x.shape
    return graph.reshape(x, (B, keys.shape[1], H // keys.shape[1], T, D))


def _rows(graph: Graph, x: ShapeArray) -> ShapeArray:
    """(B, KV, R, T, D) → (B, KV, R · T, D)."""
    B, KV, R, T, D = x.shape
    return graph.reshape(x, (B, KV, R * T, D))


def _split(graph: Graph, x: ShapeArray, like: ShapeArray) -> ShapeArray:
    """(B, KV, R · T, D) → (B, KV, R, T, D)."""
    R = like.shape[2]
    return graph.reshape(x, (*x.shape[:2], R, x.shape[2] // R, x.shape[3]))


def _added(graph: Graph, total: ShapeArray | None, more: ShapeArray) -> ShapeArray:
    """Sum of two (B, KV, S, D), of which the first is shorter."""
    if total is None:
        return more
    seen = total.shape[2]
    both = graph.add(total, graph.slice(more, 2, seen))
    return graph.concatenate((both, graph.slice(more, 2, more.shape[2] - seen)), 2)
