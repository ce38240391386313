"""Does a stopped training go on as if it had never stopped? `check_resume` compares bit by bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from workbench.errors import ConfigError, check_whole
from workbench.probes.findings import CheckReport, Finding, failed, not_applicable, passed
from workbench.probes.parameters import changed, fingerprint
from workbench.probes.training_checks.preserving import preserved_random
from workbench.probes.training_checks.subject import UserCodeError, described, shown

HEADINGS = ("resumed position", "resumed losses", "resumed weights", "resumed optimizer")
SEEDS = (1, 2)  # of the ambient random state when a training starts, and when it is resumed
SCALARS = ("step", "learning_rate")


@dataclass(frozen=True)
class State:
    """What a training holds: fingerprints, and the small numbers themselves."""

    weights: dict[str, str]
    optimizer: dict[str, str] | None  # None if the training shows none
    numbers: dict[str, float]  # the optimizer's scalars


@dataclass(frozen=True)
class Stopped:
    """A training that was stopped half-way, and gone on with."""

    losses: list[float]
    stop: int  # updates before the stop
    saved: State
    restored: State  # before the first update after the stop
    end: State


def check_resume(start: Callable, steps: int = 4) -> CheckReport:
    """Compare an uninterrupted training with one that is stopped half-way and resumed.

    The ambient random states differ between start and resumption, as in a new process; they are
    as before afterwards.

    Args:
        start: saved → training. Builds a training from nothing for None, else from what `save()`
            of an earlier one returned. A training has `step()` → loss, `save()` → object, `model`
            and, if it is to be compared, `optimizer`.
        steps: updates of each training, from 2.

    Raises:
        ConfigError: `start` is no function, or makes no such training from nothing.
    """
    check_whole("steps", steps, 2)
    if not callable(start):
        raise ConfigError(f"start must be a function, got {type(start).__name__}")
    started = time.perf_counter()
    with preserved_random():
        findings = _findings(start, steps)
    return CheckReport("resumed training", tuple(findings), time.perf_counter() - started)


def _findings(start: Callable, steps: int) -> list[Finding]:
    try:
        whole = _start(start, None)
        losses = [_step(whole, number) for number in range(steps)]
        end = _state(whole)
    except UserCodeError as error:
        raise ConfigError(f"the training cannot be checked: {error}") from error
    try:
        stopped = _interrupted(start, steps)
    except UserCodeError as error:
        cause = "save() or start(saved) does not bring back what step() needs"
        rest = [not_applicable(name, "the training could not be resumed") for name in HEADINGS[1:]]
        return [failed("resumed position", str(error), cause), *rest]
    before = losses[: stopped.stop], stopped.losses[: stopped.stop]
    if before[0] != before[1]:
        return _not_reproducible(*before)
    return [
        _check_position(losses, stopped),
        _check_losses(losses, stopped),
        _check_weights(end, stopped),
        _check_optimizer(end, stopped),
    ]


def _interrupted(start: Callable, steps: int) -> Stopped:
    first, stop = _start(start, None), steps // 2
    losses = [_step(first, number) for number in range(stop)]
    try:
        saved, state = first.save(), _state(first)
    except Exception as error:
        raise UserCodeError(f"save() raised {described(error)}") from error
    second = _start(start, saved)
    restored = _state(second)
    losses += [_step(second, number) for number in range(stop, steps)]
    return Stopped(losses, stop, state, restored, _state(second))


def _start(start: Callable, saved: object) -> object:
    seed = SEEDS[saved is not None]
    mx.random.seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    argument = "None" if saved is None else "saved"
    try:
        training = start(saved)
    except Exception as error:
        raise UserCodeError(f"start({argument}) raised {described(error)}") from error
    for name in ("step", "save"):
        if not callable(getattr(training, name, None)):
            raise UserCodeError(f"start({argument}) returned an object without .{name}()")
    if not isinstance(getattr(training, "model", None), nn.Module):
        raise UserCodeError(f"start({argument}) returned an object without a .model")
    return training


def _step(training: object, number: int) -> float:
    try:
        loss = training.step()
        loss = getattr(loss, "loss", loss)  # a report of the step carries it
        return float(loss.item() if isinstance(loss, mx.array) else loss)
    except Exception as error:
        raise UserCodeError(f"update {number + 1} raised {described(error)}") from error


def _state(training: object) -> State:
    tree = getattr(getattr(training, "optimizer", None), "state", None)
    if tree is None:
        return State(fingerprint(training.model), None, {})
    arrays = {name: a for name, a in tree_flatten(tree) if isinstance(a, mx.array)}
    numbers = {name: a.item() for name, a in arrays.items() if a.ndim == 0}
    holder = nn.Module()  # what is fingerprinted is a module's arrays
    dict.update(holder, arrays)
    return State(fingerprint(training.model), fingerprint(holder), numbers)


def _not_reproducible(whole: list[float], again: list[float]) -> list[Finding]:
    number = next(i for i, (a, b) in enumerate(zip(whole, again)) if a != b)
    says = (
        f"started from nothing twice, update {number + 1} has loss {whole[number]:.6g}, "
        f"then {again[number]:.6g}"
    )
    cause = "start(None) must build everything anew, with its own seeds: model, adapter, data"
    others = [name for name in HEADINGS if name != "resumed losses"]
    rest = [not_applicable(name, "the training does not repeat itself") for name in others]
    return [rest[0], failed("resumed losses", says, cause), *rest[1:]]


def _check_position(losses: list[float], stopped: Stopped) -> Finding:
    heading, stop = "resumed position", stopped.stop
    first = stopped.losses[stop]
    if first == losses[stop]:
        return passed(heading, f"update {stop + 1} follows update {stop}, as without the stop")
    twin = next((number for number, loss in enumerate(losses[:stop]) if loss == first), None)
    if twin == stop - 1:
        return failed(
            heading,
            f"update {stop + 1} repeats update {stop}: loss {first:.6g} again",
            "save() keeps the step before the update, or a count from 0 is read as from 1",
        )
    if twin is not None:
        return failed(
            heading,
            f"update {stop + 1} repeats update {twin + 1}: loss {first:.6g} again",
            "start(saved) begins anew: it does not use what was saved",
        )
    counted = [s.numbers.get("step") for s in (stopped.saved, stopped.restored)]
    return passed(heading, "no update is repeated" + _counted(*counted))


def _counted(saved: float | None, restored: float | None) -> str:
    return "" if saved is None or saved != restored else f"; the optimizer goes on from {saved}"


def _check_losses(losses: list[float], stopped: Stopped) -> Finding:
    heading = "resumed losses"
    for number, (expected, found) in enumerate(zip(losses, stopped.losses)):
        if expected != found:
            is_first = number == stopped.stop
            return failed(
                heading,
                f"update {number + 1}, {number - stopped.stop + 1} after the stop, has loss "
                f"{found:.9g}, without the stop {expected:.9g}",
                _loss_cause(stopped) if is_first else _later_cause(stopped),
            )
    rest = len(losses) - stopped.stop
    return passed(heading, f"the {rest} losses after the stop are equal bit for bit")


def _loss_cause(stopped: Stopped) -> str:
    if changed(stopped.saved.weights, stopped.restored.weights):
        return "the weights are not those that were saved"
    return (
        "the weights are those that were saved, so the batch or the dropout differs: save the "
        "position in the data, and seed by the step instead of the ambient random state"
    )


def _later_cause(stopped: Stopped) -> str:
    if _lost(stopped):
        return "the first update after the stop differs: look at the optimizer"
    return "the update differs: the schedule's position, the batches or the random state"


def _check_weights(end: State, stopped: Stopped) -> Finding:
    heading, lost = "resumed weights", changed(stopped.saved.weights, stopped.restored.weights)
    different = changed(end.weights, stopped.end.weights)
    if lost and different:
        says = f"{len(lost)} parameters come back other than they were saved: {shown(lost)}"
        return failed(heading, says, "save and restore all parameters that train")
    if different:
        return failed(
            heading,
            f"{len(different)} parameters come back as saved, but end differently: "
            f"{shown(different)}",
            "see the losses and the optimizer",
        )
    return passed(heading, f"all {len(end.weights)} parameters end equal bit for bit")


def _lost(stopped: Stopped) -> list[str]:
    return changed(stopped.saved.optimizer or {}, stopped.restored.optimizer or {})


def _check_optimizer(end: State, stopped: Stopped) -> Finding:
    heading = "resumed optimizer"
    if end.optimizer is None or stopped.end.optimizer is None:
        return not_applicable(heading, "the training has no .optimizer with a .state")
    different, lost = changed(end.optimizer, stopped.end.optimizer), _lost(stopped)
    if not different:
        return passed(heading, f"all {len(end.optimizer)} entries end equal bit for bit")
    numbers = [
        f"{name} ends at {stopped.end.numbers.get(name)} instead of {end.numbers.get(name)}"
        for name in SCALARS
        if end.numbers.get(name) != stopped.end.numbers.get(name)
    ]
    moments = sorted({name.rpartition(".")[2] for name in different} - end.numbers.keys())
    parts = [*numbers, *([f"{', '.join(moments)} differ"] if moments else [])]
    detail = f"{len(different)} of {len(end.optimizer)} entries end differently: " + "; ".join(
        parts
    )
    if not lost:
        cause = "the state comes back as saved; see the losses for where the ways part"
        if any(name.startswith("learning_rate") for name in numbers):
            cause = "the position in the schedule is lost: save the number of steps made"
    elif set(lost) <= set(SCALARS):
        cause = "step count or learning rate is lost: save and restore all of optimizer.state"
    else:
        cause = "the moments are lost: save and restore optimizer.state, not the weights alone"
    return failed(heading, detail, cause)
