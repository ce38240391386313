"""Every parameter of a network that is used must receive a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.subject import QUANTISED, CallFailedError, Subject

NAMED = 3  # parameters that a finding lists
TRIED = 8  # parameters without gradient that are looked at more closely
NUDGE = 1e-2  # a small change of a parameter, as a share of its size
PUSH = 3.0  # a large one, as it is

UNUSED, DETACHED, CHOOSES = "unused", "detached", "chooses"
CAUSES = {
    UNUSED: "they are not used in the forward pass",
    DETACHED: "they move the loss, but stop_gradient or a wrong vjp stands before them",
}


def check_gradients(subject: Subject) -> Iterator[Finding]:
    """Heading "gradients": every floating-point parameter receives one, finite and not zero.

    A parameter without gradient is nudged: does the loss move, it is detached; does it move only
    after a push, the parameter makes a choice (as an expert's bias does) or bounds something.
    """
    if any(isinstance(module, QUANTISED) for module in subject.model.modules()):
        yield not_applicable("gradients", "a quantised model passes none to its weights")
        return
    gradients = _gradient_sizes(subject)
    infinite = [name for name, size in gradients.items() if not np.isfinite(size)]
    # lora_a waits for lora_b to leave zero
    dead = [n for n, size in gradients.items() if size == 0 and not n.endswith("lora_a")]
    if infinite:
        yield failed(
            "gradients",
            f"{len(infinite)} of {len(gradients)} are NaN or infinite: {_named(infinite)}",
            "a division by zero or an overflow in the backward pass; a row that sees nothing",
        )
        return
    why = {name: _why_dead(subject, name) for name in dead[:TRIED]}
    for reason, cause in CAUSES.items():
        names = [name for name in dead if why.get(name) == reason]
        if names:
            count = f"{len(dead)} of {len(gradients)} parameters receive none"
            yield failed("gradients", f"{count}; {reason}: {_named(names)}", cause)
            return
    text = f"all {len(gradients)} parameters receive one, finite and not zero"
    if dead:
        text = f"{len(gradients) - len(dead)} parameters receive one; {_named(dead)} only choose"
    yield passed("gradients", text)


def _gradient_sizes(subject: Subject) -> Mapping[str, float]:
    """Largest absolute gradient of each parameter, by name."""
    original = subject.model.parameters()
    floating = {n: a for n, a in tree_flatten(original) if mx.issubdtype(a.dtype, mx.floating)}

    def loss(parameters: dict) -> mx.array:
        subject.model.update(tree_unflatten(list(parameters.items())))
        return _loss(subject)

    try:
        sizes = {name: mx.abs(g).max() for name, g in mx.grad(loss)(floating).items()}
        mx.eval(sizes)
    except Exception as error:
        kind = type(error).__name__
        raise CallFailedError(f"the backward pass raised {kind}: {error}") from error
    finally:
        subject.model.update(original)
    return {name: size.item() for name, size in sizes.items()}


def _loss(subject: Subject) -> mx.array:
    tokens = mx.array(subject.tokens(2), dtype=mx.int32)
    logits = subject.model(tokens[:, :-1])
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


def _why_dead(subject: Subject, name: str) -> str:
    array = dict(tree_flatten(subject.model.parameters()))[name]
    size = max(mx.abs(array).mean().item(), 1e-3)
    noise = mx.random.normal(array.shape, key=mx.random.key(0))

    def loss_with(amount: float) -> float:
        subject.model.update(tree_unflatten([(name, array + amount * noise)]))
        return _loss(subject).item()

    try:
        here, near, far = (loss_with(amount) for amount in (0.0, NUDGE * size, PUSH))
    finally:
        subject.model.update(tree_unflatten([(name, array)]))
    same = 1e-6 * max(1.0, abs(here))
    if abs(near - here) > same:
        return DETACHED
    return CHOOSES if abs(far - here) > same else UNUSED


def _named(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
