"""Head and cross-entropy on shapes, whole and in chunks, as `tuning/` makes MLX record them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.derivatives import Flow, gradients
from workbench.probes.planning.graph import Graph

GRADIENTS = "gradients"
LOGITS_BYTES = 32_000_000  # that the fused loss computes together, in float32
FEWEST, MOST = 64, 1024  # positions of a chunk: fewer make slow products, more save nothing
MOST_CHUNKS = 64  # that are planned: those before them are alike, and leave their slopes
Weights = Mapping[str, ShapeArray]  # of the head, by name
Head = Callable[[ShapeArray, Weights], ShapeArray]  # hidden states → logits


def chunk_positions(vocab_size: int) -> int:
    """Supervised positions whose logits the fused loss computes together: a multiple of 64."""
    fitting = LOGITS_BYTES // (4 * vocab_size)
    return max(FEWEST, min(MOST, fitting // FEWEST * FEWEST))


def whole_loss(graph: Graph, logits: ShapeArray, one_kernel: bool) -> ShapeArray:
    """Sum of the cross-entropy of logits (N, V)."""
    logits, count = graph.cast(logits, FLOAT32), logits.shape[0]
    targets = graph.held((count, 1), FLOAT32, "")
    if one_kernel:
        losses = graph.fresh("CrossEntropy", (count, 1), FLOAT32, logits, targets)
    else:
        highest = graph.broadcast(graph.fresh("Max", (count, 1), FLOAT32, logits), logits.shape)
        highest.trains = False  # MLX stops the gradient there
        logits = graph.subtract(logits, highest)
        total = graph.fresh("LogSumExp", (count, 1), FLOAT32, logits)
        score = graph.fresh("GatherAxis", (count, 1), FLOAT32, logits, targets)
        losses = graph.subtract(total, score)
    return graph.sum_last(graph.reshape(losses, (1, count)))


def fused_loss(graph: Graph, x: ShapeArray, head: Head, weights: Weights) -> ShapeArray:
    """Chunk after chunk of x (N, D): the loss, and its gradients by x and by what trains.

    Args:
        graph: gets the operations.
        x: hidden states at the supervised positions.
        head: (hidden states, weights) → logits.
        weights: of the head, and what else trains outside the layers.
    """
    trained = {name: weight for name, weight in weights.items() if weight.trains}
    size = chunk_positions(weights["embed_tokens"].shape[0])
    total, slopes, sums = graph.held((), FLOAT32, ""), [], []
    for count in _chunks(x.shape[0], size):
        part = graph.slice(x, 0, min(count, size))
        if slopes:
            (part,) = graph.after((part,), (total, slopes[-1], *sums))
        loss, slope, new = _chunk(graph, part, head, weights, trained)
        if count > size:  # many chunks, of which the slopes are left
            slope = graph.fresh("Chunks", (count, x.shape[1]), x.itemsize, slope)
        sums = [graph.add(a, b) for a, b in zip(sums, new)] if sums else new
        total, slopes = graph.add(total, loss), [*slopes, slope]
    made = (total, graph.concatenate(slopes, 0), *sums)

    def derivative(graph: Graph, total: ShapeArray, flow: ShapeArray) -> Flow:
        for source, gradient in zip((x, *trained.values()), total.siblings):
            factor = graph.broadcast(flow, gradient.shape)
            yield source, graph.cast(graph.multiply(factor, gradient), source.itemsize)

    return graph.custom((x, *trained.values()), made, derivative)[0]


def _chunks(count: int, size: int) -> Iterator[int]:
    """Positions of each chunk, those of the first many in one number."""
    chunks = [min(size, count - start) for start in range(0, count, size)]
    early = len(chunks) - MOST_CHUNKS
    if early > 1:
        chunks[:early] = [sum(chunks[:early])]
    yield from chunks


def _chunk(
    graph: Graph, part: ShapeArray, head: Head, weights: Weights, trained: Weights
) -> tuple[ShapeArray, ShapeArray, list[ShapeArray]]:
    """Loss of a chunk, its gradient by the hidden states, and those by what trains."""
    part, given = graph.leaf(part), {name: graph.leaf(w) for name, w in trained.items()}
    logits = graph.cast(head(part, {**weights, **given}), FLOAT32)
    loss = _sum_and_slopes(graph, logits)
    slope, *new = gradients(graph, loss, (part, *given.values()))
    for gradient in new:
        gradient = owner(gradient)
        gradient.label = GRADIENTS
    return loss, slope, new


def owner(array: ShapeArray) -> ShapeArray:
    """The array that got the buffer which an array lives in."""
    while array.base is not None:
        array = array.base
    return array


def _sum_and_slopes(graph: Graph, logits: ShapeArray) -> ShapeArray:
    """Sum of the cross-entropy; keeps its gradient by the logits."""
    count, column = logits.shape[0], (logits.shape[0], 1)
    targets = graph.same("Copy", graph.slice(graph.held((count + 1,), FLOAT32, ""), 0, count))
    shifted = graph.spread("Subtract", logits, graph.fresh("Max", column, FLOAT32, logits))
    score = graph.fresh("GatherAxis", column, FLOAT32, shifted, graph.reshape(targets, column))
    weights = graph.binary("Power", graph.scalar(shifted.shape), shifted)
    total = graph.sum_last(weights)
    losses = graph.subtract(graph.unary("Log", total), score)
    share = graph.binary("Divide", graph.scalar(column), total)
    slopes = graph.spread("Multiply", weights, share)
    places = graph.fresh("Arange", (count,), FLOAT32), targets
    minus = graph.reshape(graph.scalar((count,)), (count, 1, 1))
    slopes = graph.fresh("Scatter", slopes.shape, FLOAT32, slopes, *places, minus, donors=(slopes,))
    loss = graph.same("Squeeze", graph.fresh("Sum", (), FLOAT32, losses))

    def derivative(graph: Graph, loss: ShapeArray, flow: ShapeArray) -> Flow:
        (kept,) = loss.siblings
        yield logits, graph.multiply(graph.broadcast(flow, kept.shape), kept)

    return graph.custom((logits, targets), (loss, slopes), derivative)[0]
