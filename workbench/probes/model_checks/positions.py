"""Does attention know where a token stands, and only relative to the others?"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from workbench.probes.findings import NOT_APPLICABLE, Finding, failed, not_applicable, passed
from workbench.probes.model_checks.attention import AttentionCall, attention_calls
from workbench.probes.model_checks.parts import is_norm
from workbench.probes.model_checks.subject import (
    EMBEDDINGS,
    CallFailedError,
    Subject,
    difference,
)

GAP = 7  # positions by which a cache pretends to be further on


class ShiftedCache:
    """A KV cache that pretends to stand `GAP` positions further on than it does."""

    def __init__(self, cache: object, gap: int = GAP):
        self._cache, self._gap = cache, gap

    @property
    def offset(self):
        """The position that the model is told."""
        return self._cache.offset + self._gap

    def __getattr__(self, name: str):
        return getattr(self._cache, name)


def shifted(cache: object, gap: int = GAP) -> object:
    """The cache, or its parts, pretending; itself if it has no offset."""
    parts = getattr(cache, "caches", None)
    if isinstance(parts, list | tuple) and parts:
        return type(cache)(*(shifted(part, gap) for part in parts))
    return ShiftedCache(cache, gap) if hasattr(cache, "offset") else cache


def check_order(subject: Subject) -> Iterator[Finding]:
    """Heading "position order": attention tells one order of the past from another.

    Each attention module is called once more with its past reversed. Without positions, the
    output at the last token is a sum over a set, and does not change.
    """
    calls = attention_calls(subject)
    if not calls:
        yield not_applicable("position order", "no attention modules were found by their names")
        return
    own = [found for found in calls if _reads_past(found, subject.tolerance)]
    blind = [found.path for found in own if not _sees_order(found, subject.tolerance)]
    seeing, learned = len(own) - len(blind), learned_positions(subject)
    if learned:
        yield not_applicable(
            "position order", f"positions are learned ({learned}) and come with the input"
        )
    elif not own:
        yield not_applicable("position order", "attention reads no earlier token")
    elif not blind:
        yield passed("position order", f"{seeing} attention modules see the order of tokens")
    elif seeing:
        yield passed("position order", f"{seeing} of {len(own)} attention modules see it")
        yield not_applicable("position order", f"no positions in {', '.join(blind)}")
    elif len(calls) < len(getattr(subject.model, "layers", calls)):
        yield not_applicable("position order", "other layers than attention carry the order")
    else:
        yield failed(
            "position order",
            f"reversing the past changes nothing in any of {len(own)} attention modules "
            f"(first: {blind[0]})",
            "RoPE is missing, or rotates another axis than the sequence (heads before swapaxes)",
        )


def _reads_past(found: AttentionCall, same: float) -> bool:
    # Some take their keys and values from another layer, or see only themselves.
    inputs = found.call.inputs
    other = mx.concatenate([-inputs[:, :-1], inputs[:, -1:]], axis=1)
    return difference(found.again(other)[:, -1], found.again(inputs)[:, -1]) > same


def _sees_order(found: AttentionCall, same: float) -> bool:
    inputs = found.call.inputs
    length = inputs.shape[1]
    order = mx.array([*range(length - 2, -1, -1), length - 1])
    reordered = found.again(inputs[:, order])[:, -1]
    return difference(reordered, found.again(inputs)[:, -1]) > same


def learned_positions(subject: Subject) -> str:
    """Path of an embedding of positions; empty if the model has none."""
    room = subject.setting("max_position_embeddings", "n_positions", "n_ctx")
    for path, module in subject.model.named_modules():
        if not isinstance(module, EMBEDDINGS):
            continue
        rows, name = module.weight.shape[0], path.rpartition(".")[2]
        if rows != subject.vocab_size and ("pos" in name or name == "wpe" or rows == room):
            return path
    return ""


def check_offset(subject: Subject) -> Iterator[Finding]:
    """Headings "position offset" and "relative position", with a cache that misstates its offset.

    RoPE's scores depend on the distance of two tokens alone (Su et al. 2021, section 3.2.2): a
    gap between past and new tokens must change the result, a shift of all of them must not.
    """
    cache = subject.make_cache()
    if cache is None or not any(shifted(part) is not part for part in cache):
        reason = "no KV cache with an offset"
        yield not_applicable("position offset", reason)
        yield not_applicable("relative position", reason)
        return
    tokens = subject.tokens()
    half = tokens.shape[1] // 2
    learned = learned_positions(subject)
    try:
        near, far = (_continued(subject, tokens, half, gap) for gap in (0, GAP))
        here, there = (_continued(subject, tokens, 0, gap) for gap in (0, GAP))
    except CallFailedError as error:
        reason = f"the model does not run with another offset in its cache ({error})"
        yield not_applicable("position offset", reason)
        return
    gap = _gap(difference(far, near), subject, learned)
    yield gap
    moved = difference(there, here)
    if gap.status == NOT_APPLICABLE:
        yield not_applicable("relative position", gap.detail)
    elif moved > subject.tolerance and not learned and _norms_weigh_rotated(subject, tokens):
        yield not_applicable(
            "relative position", "norms inside attention weigh the rotated features one by one"
        )
    else:
        yield _relative(moved, subject.tolerance, learned)


def _continued(subject: Subject, tokens: np.ndarray, past: int, gap: int) -> np.ndarray:
    """Logits of what follows `past` tokens, at positions that are `gap` too far on."""
    cache = subject.make_cache()
    if past:
        subject.logits(tokens[:, :past], cache=cache)
    return subject.logits(tokens[:, past:], cache=[shifted(part, gap) for part in cache])


def _norms_weigh_rotated(subject: Subject, tokens: np.ndarray) -> bool:
    """Whether positions are relative once the norms inside attention weigh all features alike."""
    inside = tuple(f"{found.path}." for found in attention_calls(subject))
    norms = [m for p, m in subject.model.named_modules() if is_norm(p, m) and p.startswith(inside)]
    weights = [norm.weight for norm in norms]
    try:
        for norm in norms:
            norm.weight = mx.ones_like(norm.weight)
        here, there = (_continued(subject, tokens, 0, gap) for gap in (0, GAP))
    finally:
        for norm, weight in zip(norms, weights):
            norm.weight = weight
    return bool(norms) and difference(there, here) <= subject.tolerance


def _gap(moved: float, subject: Subject, learned: str) -> Finding:
    if moved > subject.tolerance:
        how = f"learned ({learned})" if learned else "rotary or relative"
        return passed(
            "position offset",
            f"{GAP} positions between past and new tokens move the logits by {moved:.1e}: "
            f"positions are {how} and follow the cache's offset",
        )
    if not any(_sees_order(found, subject.tolerance) for found in attention_calls(subject)):
        return not_applicable("position offset", "attention uses no positions")
    return failed(
        "position offset",
        f"{GAP} positions between the cached past and the new tokens changed nothing",
        "RoPE ignores the cache's offset: pass offset=cache.offset when rotating",
    )


def _relative(moved: float, same: float, learned: str) -> Finding:
    if learned:
        return not_applicable("relative position", f"positions are learned ({learned}), absolute")
    if moved <= same:
        return passed(
            "relative position",
            f"the same tokens {GAP} positions further on give equal logits (at most {moved:.1e})",
        )
    return failed(
        "relative position",
        f"the same tokens {GAP} positions further on move the logits by {moved:.2g} of the largest",
        "queries and keys are rotated differently: one of them without the offset, or not at all",
    )
