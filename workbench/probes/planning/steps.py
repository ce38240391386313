"""The phases of a training step as `tuning/trainer.py` makes them, and what each holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from workbench.blocks import grouped, rows_in_block
from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.graph import Graph
from workbench.probes.planning.network import GRADIENTS, Network, Work
from workbench.probes.planning.optimizers import Arrays, Rule, ruled
from workbench.probes.planning.parameters import WEIGHTS, Parameters
from workbench.probes.planning.schedule import TASKS_AHEAD, Moment, fullest_moment

OPTIMIZER, UPDATE = "optimizer", "update"
MOST_BLOCKS = 64  # of a gradient whose squares are planned: the others are alike


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


@dataclass(frozen=True)
class _Evaluation:
    """What is evaluated by itself on the way to an update."""

    outputs: Arrays
    kept: Arrays = ()  # what Python holds until the evaluation is over
    arrived: int = 0  # bytes that are there before it, and stay
    left: int = 0  # bytes that it leaves
    ahead: int = TASKS_AHEAD


def update_moment(
    parameters: Parameters, optimizer: str, held: Mapping[str, int], limit: int
) -> Moment:
    """The fullest moment of clipping and an update; old values stay until the new ones are good.

    Args:
        parameters: of which some train.
        optimizer: under its name in `TrainConfig`.
        held: bytes by part that are there before.
        limit: numbers in a block of the update, at most.
    """
    held, moments = {UPDATE: 0, **held}, []
    gradients = [parameters.gradient(array) for array in parameters.trainable]
    evaluations = [_Evaluation(_norm(gradients, limit))]
    for rule, arrays in ruled(optimizer, parameters):
        evaluations += _evaluations(parameters, rule, arrays, limit)
    for each in evaluations:
        held[UPDATE] += each.arrived
        moments.append(fullest_moment(each.outputs, held, each.ahead, each.kept))
        held[UPDATE] += each.left
    return max(moments, key=lambda moment: moment.total_bytes)


def _norm(gradients: Sequence[ShapeArray], limit: int) -> Arrays:
    """The norm of the gradients, which clipping then writes over."""
    graph = Graph(UPDATE)
    total = graph.held((), FLOAT32, "")
    for group in grouped(gradients, lambda array: array.itemsize, lambda array: array.size, limit):
        for block in _rows(graph, group, limit):
            squares = graph.unary("Square", graph.cast(block, FLOAT32))
            total = graph.add(total, graph.fresh("Sum", (), FLOAT32, squares))
    return (total,)


def _rows(graph: Graph, group: Sequence[ShapeArray], limit: int) -> Iterator[ShapeArray]:
    """Some gradients in blocks: one cut into rows, several joined."""
    whole = _joined(graph, group)
    rows = _row_count(whole)
    step = rows_in_block(rows, whole.size, limit)
    for start in range(0, rows, step)[:MOST_BLOCKS]:
        yield graph.slice(whole, 0, min(step, rows - start))


def _joined(graph: Graph, group: Sequence[ShapeArray]) -> ShapeArray:
    """See `workbench/blocks.py`; what does not lie row by row is copied before."""
    if len(group) == 1:
        return group[0]
    return graph.concatenate([graph.reshape(array, (array.size,)) for array in group], 0)


def _row_count(array: ShapeArray) -> int:
    return array.size // array.shape[-1] if array.shape[1:] else array.size


def _evaluations(
    parameters: Parameters, rule: Rule, arrays: Sequence[ShapeArray], limit: int
) -> Iterator[_Evaluation]:
    """What MLX evaluates in the update of some parameters, in its order."""
    if not rule.in_blocks:
        if arrays:
            outputs = _whole_update(parameters, rule, arrays)
            yield _Evaluation(outputs, ahead=TASKS_AHEAD + 1)  # a task may have begun before
        return
    small = [array for array in arrays if array.size <= limit]
    for group in grouped(small, lambda array: array.itemsize, lambda array: array.size, limit):
        yield _joined_update(parameters, rule, group)
    for array in arrays:
        if array.size > limit:
            yield _cut_update(rule, array, limit)


def _new_bytes(rule: Rule, arrays: Sequence[ShapeArray]) -> int:
    """Of new parameters and states."""
    return sum(array.nbytes + rule.state_bytes(array) for array in arrays)


def _whole_update(parameters: Parameters, rule: Rule, arrays: Sequence[ShapeArray]) -> Arrays:
    """What the update of all parameters makes: first they themselves, then their states."""
    graph, made = Graph(UPDATE), []
    for array in arrays:
        gradient, states = parameters.gradient(array), rule.states_of(array)
        made.append(rule.update(graph, gradient, array, *states))
    return (*(new for new, *_ in made), *(state for _, *states in made for state in states))


def _joined_update(parameters: Parameters, rule: Rule, group: Sequence[ShapeArray]) -> _Evaluation:
    """The update of small parameters, as blocks."""
    graph = Graph(UPDATE)
    gradient = _joined(graph, [parameters.gradient(array) for array in group])
    others = (_joined(graph, group) for _ in range(rule.inputs - 1))
    outputs = rule.update(graph, gradient, *others)
    return _Evaluation(outputs, (gradient,), left=_new_bytes(rule, group))


def _cut_update(rule: Rule, array: ShapeArray, limit: int) -> _Evaluation:
    """The update of some rows, before it is written to the new parameter and state."""
    graph, rows = Graph(UPDATE), _row_count(array)
    shape = (rows_in_block(rows, array.size, limit), array.size // rows)
    blocks = (graph.held(shape, array.itemsize, "") for _ in range(rule.inputs))
    outputs = rule.update(graph, *blocks)
    return _Evaluation(outputs, arrived=_new_bytes(rule, [array]))  # whole, before their first rows


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
