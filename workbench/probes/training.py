"""Is this training code right? `check_training` looks at what it does, not at how it is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

from workbench.probes.findings import CheckReport, Finding, failed, not_applicable, passed
from workbench.probes.training_checks import updates as after
from workbench.probes.training_checks.differences import check_differences
from workbench.probes.training_checks.gradients import (
    check_accumulation,
    check_gradients,
    check_terms,
    given_gradients,
    own_gradients,
    stir,
)
from workbench.probes.training_checks.logits import Reading, UnreadableLossError, read_loss
from workbench.probes.training_checks.preserving import prepared, preserved
from workbench.probes.training_checks.subject import (
    Rows,
    Training,
    UserCodeError,
    described,
    read_training,
)
from workbench.probes.training_checks.targets import (
    check_mask,
    check_reduction,
    check_shift,
    reduction_of,
)
from workbench.probes.training_checks.trainable import check_trainable

TARGET_CHECKS = ("shift", "mask", "padding", "reduction")
SLOPE_CHECKS = ("gradients", "finite differences")
UPDATE_CHECKS = ("frozen", "lora_a", "movement", "optimizer", "evaluation")
HEADINGS = ("loss", *TARGET_CHECKS, "trainable set", *SLOPE_CHECKS, *UPDATE_CHECKS, "loss terms")
REPEATS = 1e-6  # relative difference of two calls of the loss that is rounding


def check_training(
    model: nn.Module,
    loss_fn: Callable,
    batch: object,
    *,
    mode: str | None = None,
    step: Callable | None = None,
    optimizer: object = None,
    gradients: Callable | None = None,
    terms: Mapping[str, Callable] | None = None,
) -> CheckReport:
    """Look for the known faults of training code: shift, mask, padding, reduction, freezing, …

    Parameters, freeze flags, modes, optimizer and random state are as before afterwards. Loss and
    gradients are looked at with dropout off and in float32, the updates as they are.

    Args:
        model: the network that trains, its adapter attached.
        loss_fn: (model, batch) → sum or mean over the supervised targets; of a tuple, the first.
        batch: tokens (B, T) and loss_mask (B, T), True where token t is a target, as attributes
            (our `Batch`); or a list of such micro-batches.
        mode: what should train: "lora", "head" (final norm, lm_head), "full", "frozen"; or None.
        step: batch → loss: one update by your own code. AdamW and one evaluation if None.
        optimizer: the one that `step` uses, to watch its state.
        gradients: (model, batches) → tree: what your code makes of several micro-batches, before
            clipping.
        terms: by name, (model, batch) → scalar: parts of the loss that should reach parameters.

    Raises:
        ConfigError: an argument is not what it should be.
        DataError: the batch is empty, has no target, or token ids outside the vocabulary.
    """
    started = time.perf_counter()
    given = {"step": step, "optimizer": optimizer, "gradients": gradients, "terms": terms}
    training = read_training(model, loss_fn, batch, mode=mode, **given)
    with preserved(model, optimizer):
        findings = sorted(_findings(training), key=lambda finding: HEADINGS.index(finding.check))
    subject = f"training of {type(model).__name__}" + (f", mode {mode}" if mode else "")
    return CheckReport(subject, tuple(findings), time.perf_counter() - started)


def _findings(training: Training) -> Iterator[Finding]:
    yield from _guarded("trainable set", lambda: [check_trainable(training)])
    slopes = None
    with prepared(training.model):
        loss = _guarded("loss", lambda: [_check_loss(training)])
        yield from loss
        if any(finding.status == "FAILED" for finding in loss):
            yield from _left_out(
                (*TARGET_CHECKS, *SLOPE_CHECKS, *UPDATE_CHECKS, "loss terms"), "the loss failed"
            )
            return
        readings = yield from _read_targets(training)
        if training.trainable:
            slopes = _before_updates(training)
            yield from _check_slopes(training, readings)
        else:
            yield from _left_out((*SLOPE_CHECKS, "loss terms"), "nothing trains")
    if slopes is None and training.step is None:
        yield from _left_out(UPDATE_CHECKS, "nothing trains")
    else:
        yield from _check_updates(training, slopes or {})


def _guarded(heading: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; what the user's code raises is a finding too."""
    try:
        return list(check())
    except UserCodeError as error:
        return [failed(heading, str(error), "look at this error first; it may explain the rest")]
    except Exception as error:
        cause = "model, loss or step cannot be used in this way; look at this error first"
        return [failed(heading, f"the check ended in {described(error)}", cause)]


def _left_out(headings: Iterable[str], reason: str) -> Iterator[Finding]:
    for heading in headings:
        yield not_applicable(heading, reason)


def _check_loss(training: Training) -> Finding:
    losses = []
    for number, rows in enumerate(training.batches):
        where = f" of micro-batch {number}" if len(training.batches) > 1 else ""
        value = _value(training, rows)
        if not abs(value) < float("inf"):
            cause = "weights that are not finite, or a mean over rows without targets (0 / 0)"
            return failed("loss", f"the loss{where} is {value}", cause)
        with preserved(training.model):
            again = value
            if stir(training.model):  # dropout before an adapter at rest would not show
                again = _value(training, rows)
            first, second = again, _value(training, rows)
        if abs(first - second) > REPEATS * abs(first):
            return failed(
                "loss",
                f"called twice, the loss{where} is {first:.6g}, then {second:.6g}, though the "
                "model is in eval mode",
                "it turns dropout on, or draws from the random state: pass a key, or seed it by "
                "the step",
            )
        losses.append(f"{value:.4g}")
    return passed("loss", f"{', '.join(losses)}: finite, a scalar, the same when called again")


def _value(training: Training, rows: Rows) -> float:
    loss = training.loss(rows)
    try:
        return loss.item()
    except Exception as error:
        raise UserCodeError(f"evaluating the loss raised {described(error)}") from error


def _read_targets(training: Training) -> Iterator[Finding]:
    """Findings about targets; returns a `Reading` of each micro-batch, or None."""
    try:
        readings = [read_loss(training, rows) for rows in training.batches]
    except UnreadableLossError as error:
        yield from _left_out(TARGET_CHECKS, f"the loss could not be read off: {error}")
        return None
    if None in readings:
        says = "the loss does not use the model that it is given"
        yield failed("loss", says, "it closes over another model: use the first argument")
        yield from _left_out(TARGET_CHECKS, says)
        return None
    shift = check_shift(training.batches, readings)
    yield shift
    if shift.status == "FAILED":
        yield from _left_out(("mask", "padding"), "where the shift is wrong, nothing is in place")
    else:
        yield from check_mask(training.batches, readings)
    yield check_reduction(training.batches, readings)
    return readings


def _before_updates(training: Training) -> dict[str, mx.array]:
    try:
        return own_gradients(training, training.batches[0])[1]
    except Exception:  # the same call reports it under "gradients"
        return {}


def _check_slopes(training: Training, readings: list[Reading] | None) -> Iterator[Finding]:
    rows, own, losses = training.batches[0], {}, []
    with preserved(training.model):
        resting = stir(training.model)

        def check() -> Iterator[Finding]:
            loss, gradients = own_gradients(training, rows)
            losses.append(loss)
            own.update(gradients)
            found = given_gradients(training) if training.gradients else own
            yield check_gradients(training, found, resting)
            if training.gradients and readings:
                kinds = {reduction_of(*pair) for pair in zip(training.batches, readings)}
                kinds -= {"sum or mean"} if len(kinds) > 1 else set()
                kind = kinds.pop() if len(kinds) == 1 else None
                yield from filter(None, [check_accumulation(training, kind, found)])

        yield from _guarded("gradients", check)
        if own.keys() == training.trainable.keys():
            heading = "finite differences"
            yield from _guarded(heading, lambda: [check_differences(training, rows, *losses, own)])
        else:
            yield not_applicable("finite differences", "there are no gradients to compare with")
        yield from _guarded("loss terms", lambda: check_terms(training))


def _check_updates(training: Training, slopes: dict[str, mx.array]) -> Iterator[Finding]:
    with preserved(training.model, training.optimizer):
        try:
            made = after.make_updates(training)
        except UserCodeError as error:
            yield failed("movement", str(error), "no update could be made")
            yield from _left_out(
                [h for h in UPDATE_CHECKS if h != "movement"], "no update was made"
            )
            return
        yield from _guarded("frozen", lambda: [after.check_frozen(made)])
        yield from _guarded("evaluation", lambda: after.check_evaluation(made))
        if not made.trainable:
            yield from _left_out(("lora_a", "movement", "optimizer"), "nothing trains")
            return
        yield from _guarded("lora_a", lambda: [after.check_adapter(training, made, slopes)])
        yield from _guarded("movement", lambda: [after.check_movement(made)])
        yield from _guarded("optimizer", lambda: [after.check_optimizer(made)])
