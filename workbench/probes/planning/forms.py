"""Attention and SwiGLU on shapes, as `models/forms.py` makes MLX record them on a Linux CPU."""

from __future__ import annotations

from workbench.models.forms import QUERIES, keeps_probabilities
from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.derivatives import Flow
from workbench.probes.planning.graph import Graph

ATTENTION = "attention"
MOST_BLOCKS = 32  # that are planned; larger ones keep 2 % more


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
    """Queries (B, H, T, D), keys and values (B, KV, T, D) → (B, H, T, D).

    Keeps each block's probabilities, or makes them again for the gradient.
    """
    grouped, attended, kept, sums = _grouped(graph, queries, keys), [], [], []
    keeps = keeps_probabilities(queries.shape, keys.shape)
    for start, end in _blocks(queries.shape[2], keeps):
        block = _part(graph, grouped, end - start)
        if attended and not keeps:
            (block,) = graph.after((block,), (attended[-1],))
        if end - start > QUERIES and not keeps:  # many blocks, of which these rows are left
            attended.append(graph.same("Blocks", graph.times(block)))
            sums.append(2 * (graph.sum_last(block),))
            continue
        weights, highest = _weights(graph, block, graph.slice(keys, 2, end))
        share = _share(graph, weights)
        seen = graph.slice(values, 2, end)
        if keeps:
            kept.append(graph.spread("Multiply", weights, share))
            kept[-1].label = ATTENTION
            attended.append(_split(graph, graph.matmul(_rows(graph, kept[-1]), seen), block))
        else:
            product = _split(graph, graph.matmul(_rows(graph, weights), seen), block)
            attended.append(graph.spread("Multiply", product, share))
            sums.append((highest, share))
    kept = kept or [graph.concatenate(parts, 3) for parts in zip(*sums)]
    whole = graph.reshape(graph.concatenate(attended, 3), queries.shape)

    def derivative(graph: Graph, whole: ShapeArray, flow: ShapeArray) -> Flow:
        return _attention_gradients(graph, (queries, keys, values), whole, flow)

    return graph.custom((queries, keys, values), (whole, *kept), derivative)[0]


def _weights(
    graph: Graph, block: ShapeArray, keys: ShapeArray, highest: ShapeArray | None = None
) -> tuple[ShapeArray, ShapeArray]:
    """Exponentials (B, KV, R, positions, keys seen) of a block's scores, and the highest scores."""
    rows = _rows(graph, graph.times(block))
    label, graph.label = graph.label, ATTENTION
    scores = _split(graph, graph.matmul(rows, graph.swap_last(keys)), block)
    square, low = scores.shape[-2:], graph.scalar(scores.shape)
    visible = graph.visible(*square)
    scalars = graph.scalar(square), graph.scalar(square)
    bound = graph.fresh("Select", square, FLOAT32, visible, *scalars)
    scores = graph.spread("Minimum", scores, bound)
    highest = highest or graph.fresh("Max", (*scores.shape[:-1], 1), FLOAT32, scores)
    scores = graph.binary("Maximum", graph.spread("Subtract", scores, highest), low)
    power = graph.binary("Power", graph.scalar(scores.shape), scores)
    weights = graph.spread("Multiply", power, graph.cast(visible, FLOAT32))
    graph.label = label
    return weights, highest


def _share(graph: Graph, weights: ShapeArray) -> ShapeArray:
    total = graph.sum_last(weights)
    return graph.binary("Divide", graph.scalar(total.shape), total)


def _attention_gradients(
    graph: Graph, inputs: tuple[ShapeArray, ...], whole: ShapeArray, flow: ShapeArray
) -> Flow:
    queries, keys, values = inputs
    grouped, flow = _grouped(graph, queries, keys), _grouped(graph, flow, keys)
    row_sums = graph.sum_last(graph.multiply(flow, _grouped(graph, whole, keys)))
    keeps = keeps_probabilities(queries.shape, keys.shape)
    by_queries, by_keys, by_values = [], None, None
    for number, (start, end) in enumerate(_blocks(queries.shape[2], keeps)):
        size = end - start
        block, pulled = _part(graph, grouped, size), _rows(graph, _part(graph, flow, size))
        seen_keys, seen_values = graph.slice(keys, 2, end), graph.slice(values, 2, end)
        if keeps:
            chances = whole.siblings[number]
        elif size > QUERIES:  # many blocks, of which their sums are left
            by_queries.append(graph.times(block))
            by_keys, by_values = graph.times(seen_keys), graph.times(seen_values)
            continue
        else:
            if by_queries:
                before = by_queries[-1], by_keys, by_values
                block, pulled = graph.after((block, pulled), before)
            highest, share = (_part(graph, kept, size) for kept in whole.siblings)
            weights, _ = _weights(graph, block, seen_keys, highest)
            chances = graph.spread("Multiply", weights, share)
        slopes = graph.matmul(pulled, graph.swap_last(seen_values))
        slopes = _split(graph, slopes, block)
        less = graph.spread("Subtract", slopes, _part(graph, row_sums, size))
        slopes = _rows(graph, graph.multiply(chances, less))
        by_queries.append(_split(graph, graph.matmul(slopes, seen_keys), block))
        by_keys = _added(graph, by_keys, graph.matmul(graph.swap_last(slopes), _rows(graph, block)))
        turned = graph.swap_last(_rows(graph, chances))
        by_values = _added(graph, by_values, graph.matmul(turned, pulled))
    by_queries = graph.reshape(graph.concatenate(by_queries, 3), queries.shape)
    yield queries, graph.times(by_queries)
    yield keys, graph.times(by_keys)
    yield values, by_values


def _blocks(length: int, keeps: bool) -> list[tuple[int, int]]:
    """Of rows that are too long: larger ones if probabilities are kept, else the first in one."""
    size = max(QUERIES, -(-length // MOST_BLOCKS)) if keeps else QUERIES
    starts = list(range(0, length, size))
    del starts[1 : 1 - MOST_BLOCKS]
    return list(zip(starts, [*starts[1:], length]))


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
    """(B, KV, R · T, S) → (B, KV, R, T, S), with R and T of another array."""
    return graph.reshape(x, (*like.shape[:4], x.shape[3]))


def _added(graph: Graph, total: ShapeArray | None, more: ShapeArray) -> ShapeArray:
    """Sum of two (B, KV, S, D), of which the first is shorter."""
    if total is None:
        return more
    seen = total.shape[2]
    both = graph.add(total, graph.slice(more, 2, seen))
    return graph.concatenate((both, graph.slice(more, 2, more.shape[2] - seen)), 2)
