"""The phases of a training step as `tuning/trainer.py` makes them, and what each holds."""

from __future__ import annotations

from collections.abc import Mapping

from workbench.probes.planning.arrays import ShapeArray
from workbench.probes.planning.graph import Graph
from workbench.probes.planning.network import GRADIENTS, Network, Work
from workbench.probes.planning.parameters import WEIGHTS, Parameters
from workbench.probes.planning.schedule import Moment, fullest_moment

OPTIMIZER, UPDATE = "optimizer", "update"


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


def update_moment(parameters: Parameters, held: Mapping[str, int]) -> Moment:
    """The fullest moment of clipping and AdamW; old values stay until the new ones are good."""
    graph, new = Graph(UPDATE), []
    for array in parameters.trainable:
        new.append(_adamw(graph, array))
    return fullest_moment([array for group in zip(*new) for array in group], held)


def _adamw(graph: Graph, parameter: ShapeArray) -> tuple[ShapeArray, ...]:
    """Decoupled weight decay (Loshchilov and Hutter 2019), with bias correction.

    Returns:
        The new parameter, m and v, and the clipped gradient.
    """
    shape, size = parameter.shape, parameter.itemsize
    held = [graph.held(shape, size, "") for _ in range(4)]
    old, gradient, m, v = held
    factor = graph.scalar(shape, size)
    clipped = graph.multiply(gradient, factor)
    decayed = graph.multiply(old, factor)
    new_m = graph.add(graph.multiply(factor, m), graph.multiply(factor, clipped))
    square = graph.unary("Square", clipped)
    new_v = graph.add(graph.multiply(factor, v), graph.multiply(factor, square))
    numerator = graph.multiply(factor, new_m)
    root = graph.multiply(graph.unary("Sqrt", new_v), factor)
    denominator = graph.add(root, factor)
    step = graph.binary("Divide", numerator, denominator)
    return graph.subtract(decayed, step), new_m, new_v, clipped


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
