"""Who may see whom: causality, the shift, rows of a batch, padding."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from workbench.probes.findings import Finding, failed, passed
from workbench.probes.model_checks.attention import attention_calls
from workbench.probes.model_checks.subject import Subject, difference

PADDING = 3  # tokens added to a row


def moved_by_each_token(subject: Subject, tokens: np.ndarray) -> np.ndarray:
    """How far each logit moves when one token is changed.

    Args:
        tokens: (1, T) ids.

    Returns:
        (T, T): entry (t, s) is the largest change of a logit at position s when token t changes,
        as a share of the largest logit. A causal model has zeros where s < t.
    """
    before = subject.logits(tokens)
    scale = float(np.abs(before).max()) or 1.0
    moved = []
    for position in range(tokens.shape[1]):
        other = tokens.copy()
        other[0, position] = subject.another(other[0, position])
        moved.append(np.abs(subject.logits(other) - before)[0].max(axis=-1) / scale)
    return np.stack(moved)


def check_causality(subject: Subject) -> Iterator[Finding]:
    """Headings "causality" and "shift", from one matrix of changed token × moved logit."""
    matrix, same = moved_by_each_token(subject, subject.tokens()), subject.tolerance
    past = np.tril(matrix, -1)
    if past.max() > same:
        yield _acausal(matrix, past, same)
    elif np.diagonal(matrix, 1).min() <= same:
        token = int(np.diagonal(matrix, 1).argmin())
        yield failed(
            "causality",
            f"changing token {token} did not move the logits at position {token + 1}",
            "the mask hides the past, or attention does not reach the output",
        )
    elif matrix[0, -1] <= same and _should_reach(subject):
        reach = int(np.flatnonzero(matrix[0] > same).max())
        yield failed(
            "causality",
            f"changing token 0 moved the logits up to position {reach} of {len(matrix) - 1} only",
            "the mask hides a part of the past: a window that the config does not name",
        )
    elif blind := _blind_attention(subject):
        yield failed(
            "causality",
            f"{blind}: what enters at one token does not move what leaves at the next",
            "its mask hides the past; other layers carry it, so that the logits do not show this",
        )
    else:
        yield passed(
            "causality",
            f"changing any of {len(matrix)} tokens moved no logit before it "
            f"(at most {past.max():.1e}) and moved those after it",
        )
    yield _shift(matrix, same)


def _should_reach(subject: Subject) -> bool:
    # A recurrence forgets, and a window hides.
    num_layers = len(getattr(subject.model, "layers", ()))
    return subject.window is None and 0 < num_layers <= len(attention_calls(subject))


def _blind_attention(subject: Subject) -> str:
    """Path of an attention module that reads the past, but not the token before; or nothing."""
    for found in attention_calls(subject):
        inputs = found.call.inputs
        places, last = mx.arange(inputs.shape[1])[:, None], inputs.shape[1] - 1
        before = found.again(inputs)[:, -1]
        flips = (places < last, places == last - 1)  # the whole past, and its last token
        flipped = (found.again(mx.where(flip, -inputs, inputs))[:, -1] for flip in flips)
        reads_past, reads_last = (difference(f, before) > subject.tolerance for f in flipped)
        if reads_past and not reads_last:
            return found.path
    return ""


def _acausal(matrix: np.ndarray, past: np.ndarray, same: float) -> Finding:
    token, position = np.unravel_index(past.argmax(), past.shape)
    future = np.triu(matrix, 1).max()
    mask = "reversed" if future <= same else "absent, or hides the wrong tokens"
    return failed(
        "causality",
        f"logits at position {position} moved by {past.max():.2g} of the largest when token "
        f"{token} changed (and later ones by {future:.2g})",
        f"the causal mask is {mask}",
    )


def _shift(matrix: np.ndarray, same: float) -> Finding:
    """The logits at t must be the first that token t moves: the shift belongs in the loss."""
    own = np.diagonal(matrix)
    if own.min() > same:
        return passed(
            "shift", "logits at t are the first that token t moves: none inside the model"
        )
    token = int(own.argmin())
    moved = np.flatnonzero(matrix[token] > same)
    where = f"first at position {moved[0]}" if len(moved) else "nowhere"
    return failed(
        "shift",
        f"changing token {token} did not move the logits at its own position; they moved {where}",
        "the model shifts its tokens or logits; with the loss's shift they are shifted twice",
    )


def check_batch(subject: Subject) -> Iterator[Finding]:
    """Heading "batch": a row in a batch gives what it gives alone."""
    tokens = subject.tokens(3)
    together = subject.logits(tokens)
    apart = [
        difference(together[row], subject.logits(tokens[row : row + 1])[0]) for row in range(3)
    ]
    worst = int(np.argmax(apart))
    if apart[worst] <= subject.tolerance:
        yield passed("batch", f"3 rows together equal each alone (at most {apart[worst]:.1e})")
    else:
        yield failed(
            "batch",
            f"row {worst} of 3 differs from itself alone by {apart[worst]:.2g} of the top logit",
            "rows mix: heads joined on the batch axis, or a reshape that swaps batch and heads",
        )


def check_padding(subject: Subject) -> Iterator[Finding]:
    """Heading "padding": tokens added after a row change nothing in it."""
    tokens, worst = subject.tokens(2), 0.0
    length = tokens.shape[1] - PADDING
    alone = subject.logits(tokens[:, :length])
    for pad in (0, int(tokens[0, -1])):
        padded = tokens.copy()
        padded[:, length:] = pad
        worst = max(worst, difference(subject.logits(padded)[:, :length], alone))
    if worst <= subject.tolerance:
        yield passed(
            "padding", f"{PADDING} tokens on the right change nothing (at most {worst:.1e})"
        )
    else:
        yield failed(
            "padding",
            f"{PADDING} tokens on the right moved earlier logits by {worst:.2g} of the largest",
            "padding is seen by the tokens before it: the causal mask, or a mean over the sequence",
        )
    if subject.accepts("padding"):
        yield _left_padding(subject, tokens[:1, :length])


def _left_padding(subject: Subject, tokens: np.ndarray) -> Finding:
    alone = subject.logits(tokens)
    padded = np.concatenate([np.zeros((1, PADDING), tokens.dtype), tokens], axis=1)
    moved = difference(subject.logits(padded, padding=mx.array([PADDING]))[:, PADDING:], alone)
    if moved <= subject.tolerance:
        return passed(
            "padding",
            f"{PADDING} tokens on the left, declared as padding, change nothing "
            f"(at most {moved:.1e})",
        )
    return failed(
        "padding",
        f"{PADDING} tokens on the left, declared as padding, moved the logits by {moved:.2g}",
        "padding keys are not hidden, or the positions are not relative",
    )
