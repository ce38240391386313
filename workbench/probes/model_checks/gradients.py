"""Every parameter of a network that is used must receive a gradient."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.subject import QUANTISED, CallFailedError, Subject

NAMED = 3  # parameters that a finding lists
TRIED = 8  # parameters without gradient that are looked at more closely
NUDGE, NUDGES = 1e-4, 5  # small changes of a parameter, as a share of its size, and how many
MORE_ROWS = 3  # times that more tokens are tried where a parameter receives nothing
PUSH = 3.0  # a large one, as it is

UNUSED, DETACHED, CHOOSES = "unused", "detached", "chooses"
CAUSES = {
    UNUSED: "they are not used in the forward pass",
    DETACHED: "they move the loss, but stop_gradient or a wrong vjp stands before them",
}


def check_gradients(subject: Subject) -> Iterator[Finding]:
    """Heading "gradients": every floating-point parameter receives one, finite and not zero.

    A parameter without gradient is nudged: do the logits move, it is detached; do they move only
    after a push, the parameter makes a choice (as an expert's bias does) or bounds something.
    """
    if any(isinstance(module, QUANTISED) for module in subject.model.modules()):
        yield not_applicable("gradients", "a quantised model passes none to its weights")
        return
    gradients = _largest_gradients(subject)
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
    yield from _dead_findings(subject, gradients, dead)


def _dead_findings(
    subject: Subject, gradients: Mapping[str, float], dead: list[str]
) -> Iterator[Finding]:
    idle = [name for name in dead if _is_expert(name, gradients)]
    dead = [name for name in dead if name not in idle]
    why = {name: _why_dead(subject, name) for name in dead[:TRIED]}
    for reason, cause in CAUSES.items():
        names = [name for name in dead if why.get(name) == reason]
        if names:
            count = f"{len(dead)} of {len(gradients)} parameters receive none"
            yield failed("gradients", f"{count}; {reason}: {_named(names)}", cause)
            return
    text = f"all {len(gradients)} parameters receive one, finite and not zero"
    if dead or idle:
        text = f"{len(gradients) - len(dead) - len(idle)} parameters receive one"
    text += f"; {_named(dead)} only choose" if dead else ""
    yield passed("gradients", text)
    if idle:
        yield not_applicable("gradients", f"chosen by none of the tokens: {_named(idle)}")


def _largest_gradients(subject: Subject) -> dict[str, float]:
    """Over more tokens where some parameter receives none: an expert may not have been chosen."""
    sizes = _gradient_sizes(subject)
    for seed in range(1, 1 + MORE_ROWS):
        if min(sizes.values(), default=1.0) > 0 or not np.isfinite([*sizes.values()]).all():
            break
        more = _gradient_sizes(subject, seed)
        sizes = {name: max(size, more[name]) for name, size in sizes.items()}
    return sizes


def _gradient_sizes(subject: Subject, seed: int = 0) -> dict[str, float]:
    """Largest absolute gradient of each parameter, by name."""
    original = subject.model.parameters()
    floating = {n: a for n, a in tree_flatten(original) if mx.issubdtype(a.dtype, mx.floating)}

    def loss(parameters: dict) -> mx.array:
        subject.model.update(tree_unflatten(list(parameters.items())))
        tokens = mx.array(subject.tokens(2, seed=seed), dtype=mx.int32)
        logits = _logits(subject, tokens[:, :-1])
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    try:
        sizes = {name: mx.abs(g).max() for name, g in mx.grad(loss)(floating).items()}
        mx.eval(sizes)
    except Exception as error:
        kind = type(error).__name__
        raise CallFailedError(f"the backward pass raised {kind}: {error}") from error
    finally:
        subject.model.update(original)
    return {name: size.item() for name, size in sizes.items()}


def _logits(subject: Subject, tokens: mx.array) -> mx.array:
    logits = subject.model(tokens)
    return logits[0] if isinstance(logits, tuple | list) else logits


def _is_expert(name: str, sizes: Mapping[str, float]) -> bool:
    """Whether the same parameter of a sibling, in a list inside a layer, receives a gradient."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if len(numbers) < 2:
        return False  # the only list is that of the layers
    pattern = [*parts]
    pattern[numbers[-1]] = "*"
    return any(
        size > 0 and len(other) == len(parts) and fnmatch.fnmatchcase(key, ".".join(pattern))
        for key, size in sizes.items()
        for other in [key.split(".")]
    )


def _why_dead(subject: Subject, name: str) -> str:
    array = dict(tree_flatten(subject.model.parameters()))[name]
    size, tokens = max(mx.abs(array).mean().item(), 1e-3), mx.array(subject.tokens(2))

    def moves(amount: float, seed: int) -> bool:
        noise = mx.random.normal(array.shape, key=mx.random.key(seed))
        logits = []
        for changed in (array, array + amount * noise):
            subject.model.update(tree_unflatten([(name, changed)]))
            logits.append(_logits(subject, tokens))
            mx.eval(logits)
        return not mx.array_equal(*logits).item()

    try:
        # What chooses moves in steps: some small change leaves every bit as it was.
        if all(moves(NUDGE * size, seed) for seed in range(NUDGES)):
            return DETACHED
        return CHOOSES if moves(PUSH, 0) else UNUSED
    finally:
        subject.model.update(tree_unflatten([(name, array)]))


def _named(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
