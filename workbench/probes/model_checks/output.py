"""What the model returns: logits of the right shape, finite, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from workbench.numerics import not_finite
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.subject import CallFailedError, Subject

NAMED = 3  # parameters that a finding lists


def check_output(subject: Subject) -> Iterator[Finding]:
    """Heading "output": (B, T, V) logits, V as wide as the embedding has rows."""
    tokens = subject.tokens(2)
    output = subject.call(tokens)
    returned = "logits"
    if isinstance(output, tuple | list) and output:
        returned = f"a {type(output).__name__} of {len(output)}, whose first item is taken: logits"
        output = output[0]
    if not isinstance(output, mx.array):
        yield failed(
            "output",
            f"the call returned {type(output).__name__}, not an array of logits",
            "__call__(tokens) must return logits (B, T, V)",
        )
        return
    wanted = (*tokens.shape, subject.vocab_size)
    declared = subject.setting("vocab_size")
    if output.shape == (*tokens.shape, declared) and declared < subject.vocab_size:
        spare = subject.vocab_size - declared
        yield passed("output", f"{returned} {output.shape}; the embedding has {spare} rows more")
    elif output.shape == wanted:
        yield passed("output", f"{returned} (B, T, V) = {wanted}")
    else:
        yield failed(
            "output", f"shape {output.shape}, expected {wanted}", _shape_cause(output, wanted)
        )


def _shape_cause(output: mx.array, wanted: tuple[int, ...]) -> str:
    B, T, V = wanted
    if output.shape == (B, T - 1, V):
        return "the model drops its last position: the shift belongs in the loss, once"
    if output.shape == (B, V) or output.shape == (B, 1, V):
        return "the model returns the last position only; training needs all of them"
    if output.ndim == 3 and output.shape[:2] == (B, T):
        return "the head is not as wide as the embedding: a wrong lm_head, or a padded vocabulary"
    if output.ndim == 0:
        return "the model returns a loss; logits are needed to check it"
    return "the batch or the sequence axis got lost: look at reshape and swapaxes"


def check_finite(subject: Subject) -> Iterator[Finding]:
    """Heading "finite": no NaN or infinity in parameters or logits, whatever the length."""
    bad = not_finite(subject.model.parameters())
    if bad:
        named = ", ".join(bad[:NAMED]) + (", …" if len(bad) > NAMED else "")
        yield failed(
            "finite",
            f"{len(bad)} parameters hold NaN or infinity: {named}",
            "the weights are damaged, or were never loaded",
        )
    repeated = np.repeat(subject.tokens(2, 1), subject.tokens(1).shape[1], axis=1)
    rows = {"one token": subject.tokens(2, 1), "one token repeated": repeated}
    for name, tokens in {"random tokens": subject.tokens(2), **rows}.items():
        bad_places = np.argwhere(~np.isfinite(subject.logits(tokens)))
        if len(bad_places):
            row, position, token = bad_places[0]
            yield failed(
                "finite",
                f"{name}: {len(bad_places)} logits are NaN or infinite, the first in row {row} "
                f"at position {position} for token {token}",
                "a row of the mask hides everything, an epsilon is missing, or float16 overflows",
            )
            return
    if not bad:
        yield passed(
            "finite", f"all parameters, and the logits of {', '.join(rows)}, random tokens"
        )


def check_dtype(subject: Subject) -> Iterator[Finding]:
    """Heading "dtype": which types the parameters have, and that logits are floating-point."""
    kinds = ", ".join(f"{count} {name}" for name, count in subject.dtypes.most_common())
    output = subject.call(subject.tokens(1))
    output = output[0] if isinstance(output, tuple | list) else output
    if mx.issubdtype(output.dtype, mx.floating):
        yield passed(
            "dtype",
            f"parameters: {kinds}; differences up to {subject.tolerance:g} of "
            "the largest logit count as rounding",
        )
    else:
        yield failed("dtype", f"logits are {output.dtype}", "the head rounds its result")


def check_targets(subject: Subject) -> Iterator[Finding]:
    """Heading "loss": model(tokens, targets) is the mean cross-entropy of its own logits."""
    if not subject.accepts("targets"):
        yield not_applicable("loss", "the model's call takes no targets, it returns logits only")
        return
    tokens = subject.tokens(2)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    output = subject.call(inputs, targets=mx.array(targets, dtype=mx.int32))
    loss = output[-1] if isinstance(output, tuple | list) else output
    if not isinstance(loss, mx.array) or loss.size != 1:
        shape = getattr(loss, "shape", type(loss).__name__)
        raise CallFailedError(f"model(tokens, targets) returned {shape}, not one number")
    measured, expected = loss.item(), mean_cross_entropy(subject.logits(inputs), targets)
    detail = (
        f"model(tokens, targets) = {measured:.4f}, cross-entropy of its logits = {expected:.4f}"
    )
    if abs(measured - expected) <= 1e-3 * max(1.0, abs(expected)):
        yield passed("loss", detail)
    else:
        yield failed("loss", detail, "the model shifts the targets a second time, or masks some")


def mean_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -log softmax(logits)[target]: logits (..., V), targets (...), in nats."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return float((log_sums - chosen).mean())
