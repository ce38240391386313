"""The phases of a training step as `tuning/trainer.py` makes them, and what each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workbench.blocks import grouped, rows_in_block
from workbench.probes.planning.arrays import ShapeArray
from workbench.probes.planning.graph import Graph
from workbench.probes.planning.network import GRADIENTS, Network, Work
from workbench.probes.planning.parameters import WEIGHTS, Parameters
from workbench.probes.planning.schedule import Moment, fullest_moment

OPTIMIZER, UPDATE = "optimizer", "update"
NEW = 3  # arrays for each that trains: parameter, m and v


def backward_moment(
    network: Network, work: Work, held: Mapping[str, int], accumulates: bool
) -> Moment:
    """The fullest moment of forward and backward pass of one micro-batch.

    Args:
        network: a fresh one; its graph is built here.
        work: the micro-batch.
        held: bytes by part that are there already.
        accumulates: whether gradients of an earlier micro-batch are added to.
    """
    outputs = network.gradients(work)
    if accumulates:
        graph = network.graph
        graph.label = GRADIENTS
        sums = [graph.add(graph.held(g.shape, g.itemsize, GRADIENTS), g) for g in outputs[1:]]
        # The caller keeps the new gradients, too, until the next ones come.
        outputs = [*outputs, *sums]
        held = {**held, GRADIENTS: sum(g.nbytes for g in sums)}
    return fullest_moment(outputs, held)


def update_moment(parameters: Parameters, held: Mapping[str, int], limit: int) -> Moment:
    """The fullest moment of AdamW; old values stay until the new ones are good.

    Clipping has written over the gradients by then.

    Args:
        parameters: of which some train.
        held: bytes by part that are there before.
        limit: numbers in a block of the update, at most.
    """
    held, moments = {UPDATE: 0, **held}, []
    small = [array for array in parameters.trainable if array.size <= limit]
    for group in grouped(small, lambda array: array.itemsize, lambda array: array.size, limit):
        moments.append(fullest_moment(_joined_update(group), held))
        held[UPDATE] += NEW * sum(array.nbytes for array in group)
    for array in parameters.trainable:
        if array.size > limit:
            held[UPDATE] += NEW * array.nbytes  # the whole arrays, before their first rows
            moments.append(fullest_moment(_cut_update(array, limit), held))
    return max(moments, key=lambda moment: moment.total_bytes)


def _joined_update(group: Sequence[ShapeArray]) -> tuple[ShapeArray, ...]:
    """What the update of small parameters makes, as blocks."""
    graph, itemsize = Graph(UPDATE), group[0].itemsize

    def block() -> ShapeArray:
        flat = [graph.held((array.size,), itemsize, "") for array in group]
        return graph.concatenate(flat, 0)

    return _adamw(graph, *(block() for _ in range(4)))


def _cut_update(array: ShapeArray, limit: int) -> tuple[ShapeArray, ...]:
    """What the update of some rows makes, before it is written to the new parameter and state."""
    graph, rows = Graph(UPDATE), array.size // array.shape[-1] if array.shape[1:] else array.size
    shape = (rows_in_block(rows, array.size, limit), array.size // rows)
    return _adamw(graph, *(graph.held(shape, array.itemsize, "") for _ in range(4)))


def _adamw(
    graph: Graph, gradient: ShapeArray, old: ShapeArray, m: ShapeArray, v: ShapeArray
) -> tuple[ShapeArray, ...]:
    """Decoupled weight decay (Loshchilov and Hutter 2019), with bias correction.

    Returns:
        The new parameter, m and v.
    """
    factor = graph.scalar(gradient.shape, gradient.itemsize)
    decayed = graph.multiply(old, factor)
    new_m = graph.add(graph.multiply(factor, m), graph.multiply(factor, gradient))
    square = graph.unary("Square", gradient)
    new_v = graph.add(graph.multiply(factor, v), graph.multiply(factor, square))
    numerator = graph.multiply(factor, new_m)
    root = graph.multiply(graph.unary("Sqrt", new_v), factor)
    denominator = graph.add(root, factor)
    step = graph.binary("Divide", numerator, denominator)
    return graph.subtract(decayed, step), new_m, new_v


def load_moment(parameters: Parameters, file_itemsize: int) -> Moment:
    """The fullest moment of reading the weights, of another width in the file perhaps."""
    graph, weights = Graph(WEIGHTS), parameters.base_weights
    if parameters.bits:  # kept as they are in the file
        return Moment({WEIGHTS: parameters.held[WEIGHTS]}, "Load")
    read = [
        graph.cast(graph.fresh("Load", array.shape, file_itemsize), parameters.itemsize)
        for array in weights
    ]
    return fullest_moment(read, {})
