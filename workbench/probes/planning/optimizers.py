"""The optimizers' rules on shapes: what each keeps of a parameter, what its update makes.

Operation by operation what `mlx.optimizers` (0.32) makes MLX record with the settings of
`tuning/optimizers.py`: with weight decay where there is any, with momentum, and with one learning
rate for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.graph import Graph
from workbench.probes.planning.parameters import Parameters

MUON = "muon"
NEWTON_SCHULZ_STEPS = 5  # of Muon
Shape = tuple[int, ...]
Arrays = tuple[ShapeArray, ...]


@dataclass(frozen=True)
class Rule:
    """What an optimizer does with one parameter."""

    update: Callable[..., Arrays]  # (graph, gradient, old, *states) → new parameter, new states
    states: Callable[[Shape], tuple[Shape, ...]]  # a parameter's shape → those of its states
    in_blocks: bool = True  # each number by itself: see `tuning/blocks.py`

    @property
    def inputs(self) -> int:
        """Arrays that the update of a vector reads: gradient, parameter and states."""
        return 2 + len(self.states((1,)))

    def state_bytes(self, array: ShapeArray) -> int:
        """What is kept of a parameter between two steps."""
        return sum(state.nbytes for state in self.states_of(array))

    def states_of(self, array: ShapeArray) -> Arrays:
        """A parameter's states, as wide as it is."""
        graph = Graph()
        return tuple(graph.held(s, array.itemsize, "") for s in self.states(array.shape))


def ruled(optimizer: str, parameters: Parameters) -> Iterator[tuple[Rule, list[ShapeArray]]]:
    """Rules and what trains by them, in the order in which MLX evaluates their updates."""
    trained = parameters.trainable
    if optimizer != MUON:
        yield RULES[optimizer], trained
        return
    tables = {id(array) for array in parameters.top.values()}
    matrices = [a for a in trained if len(a.shape) == 2 and id(a) not in tables]
    chosen = {id(array) for array in matrices}
    yield RULES["adamw"], [array for array in trained if id(array) not in chosen]
    yield RULES[MUON], matrices


def state_bytes(optimizer: str, parameters: Parameters) -> int:
    """What an optimizer keeps between two steps."""
    return sum(rule.state_bytes(a) for rule, arrays in ruled(optimizer, parameters) for a in arrays)


def _one(shape: Shape) -> tuple[Shape, ...]:
    return (shape,)


def _two(shape: Shape) -> tuple[Shape, ...]:
    return (shape, shape)


def _rows_and_columns(shape: Shape) -> tuple[Shape, ...]:
    return (shape[:-1], shape[1:]) if shape[1:] else (shape,)


def _adamw(graph: Graph, gradient: ShapeArray, old: ShapeArray, *moments: ShapeArray) -> Arrays:
    """Decoupled weight decay (Loshchilov and Hutter 2019), with bias correction."""
    return _adam(graph, gradient, graph.times(old), *moments)


def _adam(
    graph: Graph, gradient: ShapeArray, old: ShapeArray, m: ShapeArray, v: ShapeArray
) -> Arrays:
    """Kingma and Ba 2015, with bias correction."""
    factor = graph.scalar(gradient.shape, gradient.itemsize)
    new_m = _moved(graph, m, gradient)
    new_v = _moved(graph, v, graph.unary("Square", gradient))
    numerator = graph.multiply(factor, new_m)
    root = graph.multiply(graph.unary("Sqrt", new_v), factor)
    step = graph.binary("Divide", numerator, graph.add(root, factor))
    return graph.subtract(old, step), new_m, new_v


def _sgd(graph: Graph, gradient: ShapeArray, old: ShapeArray, velocity: ShapeArray) -> Arrays:
    """With momentum and L2 regularisation."""
    gradient = graph.add(gradient, graph.times(old))
    new = graph.add(graph.times(velocity), gradient)
    return graph.subtract(old, graph.times(new)), new


def _lion(graph: Graph, gradient: ShapeArray, old: ShapeArray, m: ShapeArray) -> Arrays:
    """Chen et al. 2023, algorithm 2."""
    direction, new_m = _moved(graph, m, gradient), _moved(graph, m, gradient)
    step = graph.times(graph.unary("Sign", direction))
    return graph.subtract(graph.times(old), step), new_m


def _adafactor(graph: Graph, gradient: ShapeArray, old: ShapeArray, *before: ShapeArray) -> Arrays:
    """Shazeer and Stern 2018, algorithms 4 and 5, at a given rate."""
    rate = graph.unary("Multiply", graph.held((), gradient.itemsize, ""))
    squares = graph.unary("Square", gradient)
    squares = graph.add(squares, graph.scalar(squares.shape, squares.itemsize))
    decay = graph.cast(graph.unary("AsType", graph.held((), FLOAT32, "")), gradient.itemsize)
    decay = graph.unary("Subtract", graph.unary("Power", decay))
    means = [_mean(graph, squares, x.shape) if len(before) > 1 else squares for x in before]
    after = tuple(_averaged(graph, decay, x, mean) for x, mean in zip(before, means))
    scale = _outer_scale(graph, *after) if len(before) > 1 else graph.unary("Rsqrt", *after)
    update = graph.multiply(scale, gradient)
    clip = _mean(graph, graph.unary("Square", update), ())
    for op in ("Sqrt", "Divide", "Maximum"):
        clip = graph.unary(op, clip)
    update = graph.spread("Divide", update, clip)
    update = graph.spread("Multiply", update, rate)
    less = graph.spread("Multiply", old, graph.unary("Multiply", rate))
    return graph.subtract(graph.add(old, less), update), *after


def _averaged(graph: Graph, decay: ShapeArray, before: ShapeArray, new: ShapeArray) -> ShapeArray:
    rest = graph.unary("Subtract", decay)
    kept = graph.spread("Multiply", before, decay)
    return graph.add(kept, graph.spread("Multiply", new, rest))


def _outer_scale(graph: Graph, by_row: ShapeArray, by_column: ShapeArray) -> ShapeArray:
    """(rows, columns) of two averages of the squares, (rows,) and (columns,)."""
    shape = (by_row.size, by_column.size)
    by_row = graph.unary("Rsqrt", graph.spread("Divide", by_row, _mean(graph, by_row, (1,))))
    by_column = graph.unary("Rsqrt", by_column)
    by_row = graph.broadcast(graph.reshape(by_row, (shape[0], 1)), shape)
    by_column = graph.broadcast(graph.reshape(by_column, (1, shape[1])), shape)
    return graph.multiply(by_row, by_column)


def _muon(graph: Graph, gradient: ShapeArray, old: ShapeArray, velocity: ShapeArray) -> Arrays:
    """Jordan et al. 2024, with Nesterov's momentum."""
    gradient = graph.add(gradient, graph.times(old))
    new = _moved(graph, velocity, gradient)
    update = graph.add(graph.times(gradient), graph.times(new))
    rows, columns = update.shape
    x = graph.swap_last(update) if rows > columns else update
    squares = graph.unary("Square", graph.reshape(x, (x.size,)))
    norm = _root(graph, graph.fresh("Sum", (), x.itemsize, squares))
    x = graph.spread("Divide", x, norm)
    for _ in range(NEWTON_SCHULZ_STEPS):
        a = graph.matmul(x, graph.swap_last(x))
        b = graph.add_product(graph.times(a), a, a)
        x = graph.add_product(graph.times(x), b, x)
    x = graph.swap_last(x) if rows > columns else x
    return graph.subtract(old, graph.times(x)), new


def _moved(graph: Graph, average: ShapeArray, by: ShapeArray) -> ShapeArray:
    """An exponential moving average after one more number."""
    return graph.add(graph.times(average), graph.times(by))


def _mean(graph: Graph, x: ShapeArray, shape: Shape) -> ShapeArray:
    total = graph.same("Squeeze", graph.fresh("Sum", shape, x.itemsize, x))
    return graph.times(total)


def _root(graph: Graph, x: ShapeArray) -> ShapeArray:
    return graph.unary("Add", graph.unary("Sqrt", x))


RULES = {
    "adamw": Rule(_adamw, _two),
    "adam": Rule(_adam, _two),
    "sgd": Rule(_sgd, _one),
    "lion": Rule(_lion, _one),
    "adafactor": Rule(_adafactor, _rows_and_columns, in_blocks=False),
    MUON: Rule(_muon, _one, in_blocks=False),
}
OPTIMIZERS = tuple(RULES)  # the first is the trainer's default
