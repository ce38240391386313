"""Who gets gradient, whether micro-batches are joined rightly, and whether terms reach anyone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from workbench.numerics import not_finite
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.training_checks.subject import (
    Rows,
    Training,
    UserCodeError,
    described,
    scalar_of,
    shown,
)

SAME = 1e-4  # relative difference of gradients that is rounding


def own_gradients(training: Training, rows: Rows) -> tuple[float, dict[str, mx.array]]:
    """`nn.value_and_grad` of one micro-batch: the loss, and the gradients by name, evaluated.

    Raises:
        UserCodeError: the loss failed.
    """
    loss, gradients = nn.value_and_grad(training.model, lambda: training.loss(rows))()
    mx.eval(loss, gradients)
    return loss.item(), dict(tree_flatten(gradients))


def given_gradients(training: Training) -> dict[str, mx.array]:
    """What the user's code makes of all micro-batches, by name.

    Raises:
        UserCodeError: it raised, or returned no tree of arrays.
    """
    try:
        tree = training.gradients(training.model, [rows.given for rows in training.batches])
        found = dict(tree_flatten(tree))
        mx.eval(found)
    except Exception as error:
        raise UserCodeError(f"gradients raised {described(error)}") from error
    if not all(isinstance(array, mx.array) for array in found.values()):
        raise UserCodeError("gradients returned something else than a tree of arrays")
    return found


def check_gradients(
    training: Training, found: dict[str, mx.array], resting: Sequence[str]
) -> Finding:
    """Heading "gradients": of exactly the trainable names, finite, none of them zero.

    Args:
        training: what is under test.
        found: gradients by name.
        resting: names of the parameters that were zero and are random while this is checked.
    """
    trainable = training.trainable
    surplus, lacking = sorted(found.keys() - trainable), sorted(trainable.keys() - found)
    if surplus:
        return failed(
            "gradients",
            f"{len(surplus)} frozen parameters get a gradient: {shown(surplus)}",
            "mx.value_and_grad differentiates by all parameters: use nn.value_and_grad(model, …)",
        )
    if lacking:
        says = f"{len(lacking)} trainable parameters have no gradient: {shown(lacking)}"
        return failed("gradients", says, "differentiate by model.trainable_parameters()")
    shapes = [name for name, array in found.items() if array.shape != trainable[name].shape]
    if shapes:
        says = f"the gradients of {shown(shapes)} have another shape than the parameters"
        return failed("gradients", says, "a custom vjp returns the wrong array")
    bad = not_finite(found)
    if bad:
        says = f"{len(bad)} gradients hold NaN or infinity: {shown(bad)}"
        return failed("gradients", says, "a division by zero, or an overflow, in the backward pass")
    zero = zeros(found)
    if zero:
        cause = "they are not on the way from the tokens to the loss, or stop_gradient cuts them"
        says = f"{len(zero)} of {len(found)} gradients are exactly zero: {shown(zero)}"
        return failed("gradients", says, cause)
    note = f" (with {len(resting)} that start at zero set to small random numbers)"
    detail = f"{len(found)} gradients, of exactly the trainable names, finite, none zero"
    return passed("gradients", detail + (note if resting else ""))


def zeros(arrays: dict[str, mx.array]) -> list[str]:
    """Names of the arrays that are zero everywhere."""
    checks = {name: mx.any(array != 0) for name, array in arrays.items()}
    mx.eval(checks)
    return [name for name, any_ in checks.items() if not any_.item()]


def stir(model: nn.Module, seed: int = 0, scale: float = 0.02) -> list[str]:
    """Put small random numbers into trainable parameters that are all zero; returns their names.

    While lora_b is zero, nothing can be said about lora_a.
    """
    trainable = dict(tree_flatten(model.trainable_parameters()))
    resting = zeros(trainable)
    keys = mx.random.split(mx.random.key(seed), max(1, len(resting)))
    new = [
        (name, scale * mx.random.normal(array.shape, array.dtype, key=key))
        for key, (name, array) in zip(keys, ((name, trainable[name]) for name in resting))
    ]
    model.load_weights(new, strict=False)
    return resting


def check_accumulation(training: Training, kind: str | None, found: dict) -> Finding | None:
    """Heading "reduction": the user's gradients are those of the mean over all targets.

    Args:
        training: what is under test.
        kind: how the loss reduces one micro-batch, "sum" or "mean"; None if it is neither.
        found: the user's gradients over all micro-batches, by name.
    """
    names = training.trainable.keys()
    if kind is None or not names <= found.keys():
        return None
    total, reference = sum(rows.num_tokens for rows in training.batches), None
    for rows in training.batches:
        weight = (rows.num_tokens if kind == "mean" else 1.0) / total
        own = tree_map(lambda g, w=weight: w * g, own_gradients(training, rows)[1])
        reference = own if reference is None else tree_map(mx.add, reference, own)
    size = _norm(reference)
    errors = {
        factor: _norm({n: found[n] / factor - reference[n] for n in names}) / (size or 1.0)
        for factor in (1, total)
    }
    factor = min(errors, key=errors.get)
    of = f"{len(training.batches)} micro-batches ({total} targets)"
    if errors[factor] <= SAME:
        name = "mean" if factor == 1 else "sum"
        return passed("reduction", f"gradients over {of} are those of the {name} over all targets")
    return failed(
        "reduction",
        f"gradients over {of} are {100 * errors[factor]:.2g} % off those of the mean over all "
        "targets",
        "micro-batches are averaged without token weights: sum losses and gradients, then divide "
        "by the number of targets once",
    )


def _norm(gradients: dict[str, mx.array]) -> float:
    return mx.sqrt(sum(g.astype(mx.float32).square().sum() for g in gradients.values())).item()


def check_terms(training: Training) -> list[Finding]:
    """Heading "loss terms": every named term reaches a parameter."""
    if not training.terms:
        return [not_applicable("loss terms", "no terms were given: terms={'name': function}")]
    findings = []
    for name, term in training.terms.items():
        try:
            findings.append(_check_term(training, name, term))
        except UserCodeError as error:
            findings.append(failed("loss terms", str(error), f"look at the term {name!r}"))
    return findings


def _check_term(training: Training, name: str, term: Callable) -> Finding:
    def total() -> mx.array:
        label, model = f"the term {name!r}", training.model
        return sum(scalar_of(label, term, model, rows.given) for rows in training.batches)

    value, gradients = nn.value_and_grad(training.model, total)()
    norm = _norm(dict(tree_flatten(gradients)))
    detail = f"{name} = {value.item():.4g}, gradient norm {norm:.4g}"
    if norm == 0:
        return failed(
            "loss terms",
            f"{detail}: it reaches no parameter",
            "it shifts the reported loss and trains nothing: it depends on data alone, or a "
            "stop_gradient cuts it",
        )
    if not norm < float("inf"):
        return failed("loss terms", detail, "the term's gradient is not finite")
    return passed("loss terms", detail)
