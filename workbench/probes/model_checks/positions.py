"""Do positions follow the cache's offset, and count relative to each other only?"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from workbench.probes.findings import NOT_APPLICABLE, Finding, failed, not_applicable, passed
from workbench.probes.model_checks.attention import attention_calls
from workbench.probes.model_checks.order import adds_positions, sees_order
from workbench.probes.model_checks.parts import is_norm
from workbench.probes.model_checks.subject import (
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
    try:
        near, far = (continued(subject, tokens, half, gap) for gap in (0, GAP))
        here, there = (continued(subject, tokens, 0, gap) for gap in (0, GAP))
    except CallFailedError as error:
        reason = f"the model does not run with another offset in its cache ({error})"
        yield not_applicable("position offset", reason)
        return
    gap = _gap(difference(far, near), subject)
    yield gap
    moved = difference(there, here)
    if gap.status == NOT_APPLICABLE:
        yield not_applicable("relative position", gap.detail)
    elif adds_positions(subject):
        yield not_applicable("relative position", "positions are added to the input: absolute")
    elif moved > subject.tolerance and _norms_weigh_rotated(subject, tokens):
        yield not_applicable(
            "relative position", "norms inside attention weigh the rotated features one by one"
        )
    else:
        yield _relative(moved, subject.tolerance)


def continued(subject: Subject, tokens: np.ndarray, past: int, gap: int) -> np.ndarray:
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
        here, there = (continued(subject, tokens, 0, gap) for gap in (0, GAP))
    finally:
        for norm, weight in zip(norms, weights):
            norm.weight = weight
    return bool(norms) and difference(there, here) <= subject.tolerance


def _gap(moved: float, subject: Subject) -> Finding:
    if moved > subject.tolerance:
        return passed(
            "position offset",
            f"{GAP} positions between past and new tokens move the logits by {moved:.1e}: "
            "positions follow the cache's offset",
        )
    calls, past = attention_calls(subject), range(subject.length - 1)
    if not calls:
        return not_applicable("position offset", "no attention module was found, nor an effect")
    if not any(sees_order(found, past, subject.tolerance) for found in calls):
        return not_applicable("position offset", "attention uses no positions")
    return failed(
        "position offset",
        f"{GAP} positions between the cached past and the new tokens changed nothing",
        "RoPE ignores the cache's offset: pass offset=cache.offset when rotating",
    )


def _relative(moved: float, same: float) -> Finding:
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
