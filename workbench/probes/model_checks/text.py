"""A trained model and its tokenizer, on plain English."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from workbench.models.structure import module_at
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.attention import KEYS, QUERIES, AttentionCall, attention_calls
from workbench.probes.model_checks.heads import head_dims
from workbench.probes.model_checks.output import mean_cross_entropy
from workbench.probes.model_checks.subject import Subject

PROSE = (
    "The sun rises in the east and sets in the west. In the morning the children walk to school, "
    "and in the evening they come back home to eat dinner with their family. Water is made of "
    "hydrogen and oxygen. It freezes at zero degrees and boils at one hundred degrees."
)
KNOWS = 0.75  # a model whose loss is below this share of a uniform guess has learned English
LAYOUT_MARGIN = 0.1  # nats by which the other RoPE layout must be better to be the right one


def check_tokenizer(subject: Subject) -> Iterator[Finding]:
    """Heading "tokenizer": every id it can give has a row in the embedding."""
    if subject.tokenizer is None:
        yield not_applicable("tokenizer", "none was given: tokenizer=…")
        return
    try:
        size = len(subject.tokenizer)
        highest = max([size - 1, *subject.tokenizer.encode(PROSE)])
    except Exception as error:
        yield failed(
            "tokenizer",
            f"it raised {type(error).__name__}: {error}",
            "check_model needs a tokenizer with encode(text) and a length",
        )
        return
    if highest >= subject.vocab_size:
        yield failed(
            "tokenizer",
            f"ids up to {highest}, the embedding has {subject.vocab_size} rows",
            "this tokenizer belongs to another model; MLX would read beyond the embedding",
        )
    else:
        yield passed("tokenizer", f"{size} ids, the embedding has {subject.vocab_size} rows")


def check_text(subject: Subject) -> Iterator[Finding]:
    """Headings "text" and "RoPE layout": what only trained weights can show."""
    tokens = _prose(subject)
    if tokens is None:
        reason = "needs a tokenizer that fits" if subject.tokenizer else "needs a tokenizer"
        yield not_applicable("text", reason)
        yield not_applicable("RoPE layout", f"{reason} and trained weights, or a reference")
        return
    logits = subject.logits(tokens)
    length = tokens.shape[1]
    losses = {
        lag: mean_cross_entropy(logits[:, : length - lag], tokens[:, lag:]) for lag in range(3)
    }
    uniform = math.log(subject.vocab_size)
    best = min(losses, key=losses.get)
    knows = losses[best] < KNOWS * uniform
    if knows and best != 1:
        lags = ", ".join(f"{loss:.2f} for t + {lag}" for lag, loss in losses.items())
        yield failed(
            "text",
            f"loss in nats a token: {lags}; the lowest must be that of t + 1",
            "the model shifts its logits itself",
        )
    elif knows:
        yield passed(
            "text",
            f"{losses[1]:.2f} nats a token on plain English, a uniform guess "
            f"{uniform:.2f}; it predicts t + 1, not t or t + 2",
        )
    else:
        yield not_applicable(
            "text",
            f"{losses[1]:.2f} nats a token on plain English, a uniform guess {uniform:.2f}: the "
            "weights are random, wrong, or of another language",
        )
    yield _layout(subject, tokens, losses[1], uniform)


def _prose(subject: Subject) -> np.ndarray | None:
    if subject.tokenizer is None:
        return None
    try:
        ids = [i for i in subject.tokenizer.encode(PROSE) if 0 <= i < subject.vocab_size]
    except Exception:
        return None  # already reported under "tokenizer"
    room = subject.setting("max_position_embeddings", "n_positions") or len(ids)
    return np.array([ids[: min(room, 256)]]) if len(ids) > 8 else None


def _layout(subject: Subject, tokens: np.ndarray, loss: float, uniform: float) -> Finding:
    """Would the weights read better with their rotated features paired the other way?"""
    found = [a for a in attention_calls(subject) if a.part(QUERIES) and a.part(KEYS)]
    dims = head_dims(subject, found[0]) if found else None
    if dims is None:
        return not_applicable("RoPE layout", "no query and key projections of their own")
    head_dim = dims[2]
    losses = {}
    for kind, order in (("half-split", _to_half_split), ("interleaved", _to_interleaved)):
        with _reordered(subject, found, order(head_dim)):
            logits = subject.logits(tokens)
        losses[kind] = mean_cross_entropy(logits[:, :-1], tokens[:, 1:])
    kind, other = min(losses.items(), key=lambda item: item[1])
    if other < loss - LAYOUT_MARGIN and other < KNOWS * uniform:
        return failed(
            "RoPE layout",
            f"{loss:.2f} nats a token; {other:.2f} with q and k reordered to {kind}",
            "RoPE pairs features (2i, 2i + 1) where the weights pair (i, i + head_dim / 2), or the "
            "reverse: see `traditional`, and GGUF's permutation",
        )
    if loss < KNOWS * uniform:
        return passed(
            "RoPE layout", f"{loss:.2f} nats a token; reordered for the other layout {other:.2f}"
        )
    return not_applicable("RoPE layout", "the weights know no English in either layout")


@contextlib.contextmanager
def _reordered(
    subject: Subject, found: Sequence[AttentionCall], order: np.ndarray
) -> Iterator[None]:
    """Within the block, the rows of q and k of every head stand in another order (head_dim,)."""
    originals = []
    for attention in found:
        for names in (QUERIES, KEYS):
            module = module_at(subject.model, attention.part(names))
            module = module.get("linear", module)  # that a LoRA layer wraps
            rows = ("weight", "bias", "scales", "biases")
            originals += [(module, name, module[name]) for name in rows if name in module]
    try:
        for module, name, array in originals:
            heads = np.arange(array.shape[0] // len(order))
            module[name] = array[mx.array((heads[:, None] * len(order) + order).reshape(-1))]
        yield
    finally:
        for module, name, array in originals:
            module[name] = array


def _to_half_split(head_dim: int) -> np.ndarray:
    # Interleaved rows 0 1 2 3 … become 0 2 4 … 1 3 5 …
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def _to_interleaved(head_dim: int) -> np.ndarray:
    return np.arange(head_dim).reshape(2, -1).T.reshape(-1)
