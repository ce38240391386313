"""Gradients against central differences: (f(x + h·d) − f(x − h·d)) / 2h (Press et al. 2007,
Numerical Recipes, section 5.7)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.training_checks.subject import Rows, Training, shown

CHANGE = 0.01  # of the loss: the change that a step aims at
# Largest step: a share of each tensor's norm; for one entry, of the tensor's root mean square.
LARGEST = {"tensor": 0.02, "random": 0.005, "entry": 0.3}
SHORTER = (1, 4, 16, 64)  # divisors of the step, until the slope agrees or settles
SAME = 0.02  # relative difference of the two derivatives that truncation may cause
ROUNDINGS = 8  # of the loss, in units of its precision, that a forward pass may leave
VISIBLE = 0.1  # a derivative is measured if rounding may change it by no more than this share
PRECISION = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
SMALL = 20_000_000  # numbers in a model: up to here every kind of tensor has its own direction
FEW, MANY = 3, 24  # directions
# Liu et al. 2024, DoRA, section 4.3
CUT = "DoRA's lora_a and lora_b are left out: it takes their norm for a constant on purpose"


@dataclass(frozen=True)
class Direction:
    """A way through parameter space, and the derivative that the gradients claim along it."""

    name: str
    steps: dict[str, mx.array]  # by parameter; those left out stay
    claimed: float
    largest: float  # step


@dataclass(frozen=True)
class Measured:
    """A derivative by central differences."""

    direction: Direction
    value: float
    rounding: float  # what the value may be off by

    @property
    def error(self) -> float:
        """Departure from the claimed derivative, relative to the larger of the two."""
        return abs(self.value - self.direction.claimed) / self._size

    @property
    def uncertainty(self) -> float:
        """What rounding may change, relative to the larger of the two."""
        return self.rounding / self._size

    @property
    def agrees(self) -> bool:
        """Whether truncation and rounding explain the difference."""
        return self.error <= SAME + self.uncertainty

    @property
    def is_visible(self) -> bool:
        """Whether rounding leaves enough of the derivative to judge it by."""
        return self.uncertainty <= VISIBLE

    @property
    def _size(self) -> float:
        return max(abs(self.value), abs(self.direction.claimed), np.finfo(np.float32).tiny)


def check_differences(
    training: Training, rows: Rows, loss: float, gradients: dict[str, mx.array]
) -> Finding:
    """Heading "finite differences": the gradients are the slope of the loss.

    Along the gradient of every kind of tensor (all layers together), along a random direction of
    all of them, and for the entries with the largest gradients.

    Args:
        training: what is under test; its parameters move, and come back.
        rows: the micro-batch.
        loss: of that micro-batch.
        gradients: of that loss, by name.

    Raises:
        UserCodeError: the loss failed.
    """
    parameters = dict(tree_flatten(training.model.parameters()))
    is_small = sum(array.size for array in parameters.values()) <= SMALL
    coarsest = max(PRECISION.get(array.dtype, 0.0) for array in parameters.values())
    trainable = {n: a for n, a in training.trainable.items() if not _is_cut(n, parameters)}
    if not trainable:
        return not_applicable("finite differences", CUT)
    loss = abs(loss)

    def value(moved: dict[str, mx.array]) -> float:
        training.model.update(tree_unflatten(list(moved.items())))
        return training.loss(rows).item()

    slopes, measured = {name: gradients[name] for name in trainable}, []
    for direction in _directions(trainable, slopes, MANY if is_small else FEW):
        start = {name: trainable[name] for name in direction.steps}
        measured.append(_measure(direction, start, value, loss, ROUNDINGS * coarsest * loss))
        training.model.update(tree_unflatten(list(start.items())))
    is_all = len(trainable) == len(gradients)
    return _judged(measured, "" if is_all else f"; {CUT}")


def _judged(measured: list[Measured], note: str) -> Finding:
    heading = "finite differences"
    wrong = [m for m in measured if not m.agrees]
    if wrong:
        worst = max(wrong, key=lambda m: m.error / (SAME + m.uncertainty))
        return failed(
            heading,
            f"{worst.direction.name}: the gradient claims a slope of {worst.direction.claimed:.4g},"
            f" central differences give {worst.value:.4g} ± {worst.rounding:.1g}; "
            f"{len(wrong)} of {len(measured)} slopes are wrong",
            "a stop_gradient cuts a part of the loss, or a custom vjp is wrong",
        )
    seen = [m for m in measured if m.is_visible]
    if not seen:
        reason = f"rounding or jumps hide all {len(measured)} slopes; check with float32 weights"
        return not_applicable(heading, reason)
    worst, hidden = max(seen, key=lambda m: m.error), len(measured) - len(seen)
    detail = (
        f"{len(seen)} slopes agree within {100 * worst.error:.2g} % "
        f"({worst.direction.name}; allowed {100 * SAME:g} % and rounding)"
    )
    hides = f"; rounding or a jump hides {hidden} more" if hidden else ""
    return passed(heading, detail + hides + note)


def _is_cut(name: str, parameters: dict[str, mx.array]) -> bool:
    """Whether a parameter is DoRA's, whose gradient is cut on purpose."""
    place, _, end = name.rpartition(".")
    return end in ("lora_a", "lora_b") and f"{place}.m" in parameters


def _directions(
    trainable: dict[str, mx.array], gradients: dict[str, mx.array], count: int
) -> Iterator[Direction]:
    sizes = {name: _norm(array) for name, array in trainable.items()}
    slopes = {name: _norm(array) for name, array in gradients.items()}
    groups: dict[str, list[str]] = {}
    for name in trainable:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    kinds = sorted(groups)
    for first in range(min(count, len(kinds))):
        chosen = kinds[first::count]
        names = [name for kind in chosen for name in groups[kind] if slopes[name]]
        # Each tensor moves by the same share of its norm: none is drowned by a larger one.
        steps = {name: gradients[name] * (sizes[name] / slopes[name]) for name in names}
        claimed = sum(slopes[name] * sizes[name] for name in names)
        if names:
            yield Direction(shown(chosen), steps, claimed, LARGEST["tensor"])
    random = {}
    for key, (name, array) in zip(mx.random.split(mx.random.key(0), len(sizes)), trainable.items()):
        noise = mx.random.normal(array.shape, key=key)
        random[name] = noise * (sizes[name] / _norm(noise))
    claimed = sum((random[name] * gradients[name]).sum().item() for name in trainable)
    yield Direction("a random direction of all", random, claimed, LARGEST["random"])
    yield from _entries(trainable, gradients, sizes, 1 if count == FEW else 4)


def _entries(
    trainable: dict[str, mx.array],
    gradients: dict[str, mx.array],
    sizes: dict[str, float],
    count: int,
) -> Iterator[Direction]:
    peaks = {name: mx.abs(array).max() for name, array in gradients.items()}
    mx.eval(peaks)
    for name in sorted(peaks, key=lambda name: -peaks[name].item())[:count]:
        gradient = gradients[name]
        place = mx.abs(gradient).argmax().item()
        mean_square = sizes[name] / np.sqrt(trainable[name].size)
        unit = mean_square * (mx.arange(gradient.size) == place).reshape(gradient.shape)
        index = ", ".join(str(int(i)) for i in np.unravel_index(place, gradient.shape))
        claimed = gradient.reshape(-1)[place].item() * mean_square
        yield Direction(f"{name}[{index}]", {name: unit}, claimed, LARGEST["entry"])


def _measure(
    direction: Direction,
    start: dict[str, mx.array],
    value: Callable[[dict[str, mx.array]], float],
    loss: float,
    rounding: float,
) -> Measured:
    """The slope along a direction, with shorter steps until it agrees, or settles elsewhere.

    A slope that does neither is hidden: by rounding, or by a jump, such as of a router that
    chooses other experts, which weighs the more the shorter the step is.
    """
    step = direction.largest
    if direction.claimed and loss:
        step = min(step, CHANGE * loss / (2 * abs(direction.claimed)))
    previous = math.inf
    for shorter in SHORTER:
        h = step / shorter
        up, down = (
            value({name: start[name] + sign * h * d for name, d in direction.steps.items()})
            for sign in (1, -1)
        )
        measured = Measured(direction, (up - down) / (2 * h), rounding / h)
        settled = abs(measured.value - previous) <= SAME * abs(previous) + measured.rounding
        if measured.agrees or (settled and math.isfinite(previous)):
            return measured
        previous = measured.value
    return Measured(direction, measured.value, math.inf)


def _norm(array: mx.array) -> float:
    return mx.sqrt(array.astype(mx.float32).square().sum()).item()
