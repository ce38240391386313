"""Grouped-query attention: which query heads read which key/value head."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.models.stand_ins import intercepted
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.attention import (
    KEYS,
    OUTPUTS,
    VALUES,
    AttentionCall,
    attention_calls,
)
from workbench.probes.model_checks.subject import Subject
from workbench.probes.recording import recorded

HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads", "multi_query")
LINEAR = (nn.Linear, nn.QuantizedLinear)
SAMPLED = 24  # features of a fused projection that are tried
TILED = (
    "key/value heads are tiled (0 1 2 0 1 2) where they must be repeated (0 0 1 1 2 2), or heads "
    "and features are swapped in a reshape"
)


def check_grouped_heads(subject: Subject) -> Iterator[Finding]:
    """Heading "grouped heads": query head h reads key/value head h // (H / KV).

    The convention of Hugging Face's checkpoints. The features of one key or value head are
    disturbed; the query heads that move must be its group (Ainslie et al. 2023, section 2.2).
    """
    found = [a for a in attention_calls(subject) if a.part(OUTPUTS) and _heads(subject, a)]
    # Where some have values of their own, the others take them from there.
    found = [a for a in found if a.part(VALUES)] or found
    if not found:
        yield not_applicable(
            "grouped heads", "no attention with an output projection and a known number of heads"
        )
        return
    for attention in (found[0], found[-1])[: len(found)]:
        check = _separate if attention.part(VALUES) else _fused
        finding = check(subject, attention, _heads(subject, attention))
        if finding.status != "ok":
            break
    yield finding


def _heads(subject: Subject, attention: AttentionCall) -> int | None:
    """Query heads of a module: it may have its own number, or the config's."""
    own = [vars(attention.module).get(name) for name in HEADS]
    return next((n for n in (*own, subject.setting(*HEADS)) if isinstance(n, int) and n > 0), None)


def head_dims(subject: Subject, attention: AttentionCall) -> tuple[int, int, int] | None:
    """(query heads, key/value heads, head_dim) of an attention module; None if they are unknown."""
    value, output = attention.part(VALUES), attention.part(OUTPUTS)
    heads = _heads(subject, attention)
    if heads is None or value is None or output is None:
        return None
    widths = _widths(subject, attention, [value, output])
    if len(widths) < 2 or widths[output][0] % heads:
        return None
    head_dim = widths[output][0] // heads
    if widths[value][1] % head_dim or heads % (widths[value][1] // head_dim):
        return None
    return heads, widths[value][1] // head_dim, head_dim


def _widths(
    subject: Subject, attention: AttentionCall, paths: list[str]
) -> dict[str, tuple[int, int]]:
    """Features that go into and come out of projections, in the order of their calls."""
    with recorded(subject.model, paths) as heard:
        attention.again(attention.call.inputs)
    calls = [call for call in heard if call.inputs is not None and call.result is not None]
    return {call.path: (call.inputs.shape[-1], call.result.shape[-1]) for call in calls}


def _separate(subject: Subject, attention: AttentionCall, heads: int) -> Finding:
    dims = head_dims(subject, attention)
    if dims is None:
        return not_applicable("grouped heads", f"the heads of {attention.path} are not of one size")
    _, kv_heads, head_dim = dims
    group = heads // kv_heads
    for kind, names in (("value", VALUES), ("key", KEYS)):
        projection = attention.part(names)
        for kv_head in range(kv_heads) if projection else ():
            feature = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
            readers = _readers(subject, attention, projection, _flipped(feature), heads)
            expected = list(range(kv_head * group, (kv_head + 1) * group))
            tiled = readers == list(range(kv_head, heads, kv_heads))
            if readers != expected and tiled and subject.setting(*KV_HEADS) is None:
                return not_applicable(
                    "grouped heads",
                    "key/value heads are tiled (0 1 0 1); the config names none, so that this "
                    "convention is the model's own",
                )
            if readers != expected:
                return failed(
                    "grouped heads",
                    f"{attention.path}: {kind} head {kv_head} is read by query heads {readers}, "
                    f"expected {expected}",
                    TILED,
                )
    return passed("grouped heads", f"{heads} query heads read {kv_heads} key/value heads in order")


def _fused(subject: Subject, attention: AttentionCall, heads: int) -> Finding:
    """Queries, keys and values in one projection, whatever their order in it.

    A key or value feature of a past token moves the last token's heads of one group: they must
    be neighbours. A query feature moves none.
    """
    output = attention.part(OUTPUTS)
    linear = [p for p, m in attention.module.named_modules() if p and isinstance(m, LINEAR)]
    widths = _widths(subject, attention, [f"{attention.path}.{path}" for path in linear])
    fused, (_, width) = next(iter(widths.items()))
    if fused == output or width <= widths[output][0] or widths[output][0] % heads:
        reason = f"{attention.path} has neither one projection for values nor a fused one"
        return not_applicable("grouped heads", reason)
    groups = set()
    for feature in np.random.default_rng(0).permutation(width)[:SAMPLED].tolist():
        readers = _readers(subject, attention, fused, _pushed(feature), heads, last_only=True)
        groups.add(tuple(readers))
    groups.discard(())
    apart = [group for group in groups if group[-1] - group[0] + 1 != len(group)]
    if apart:
        return failed(
            "grouped heads",
            f"{attention.path}: one key/value head is read by query heads {list(min(apart))}, "
            "which are not neighbours",
            TILED,
        )
    sizes = sorted({len(group) for group in groups})
    return passed("grouped heads", f"a key/value head is read by {sizes} neighbouring query heads")


def _flipped(feature: slice) -> Callable[[mx.array], mx.array]:
    # The sign alone: a norm over all of the features (OLMo 2) then gives the others as before.
    def disturb(result: mx.array) -> mx.array:
        signs = mx.ones(result.shape[-1])
        signs[feature] = -1.0
        return result * signs

    return disturb


def _pushed(feature: int) -> Callable[[mx.array], mx.array]:
    def disturb(result: mx.array) -> mx.array:
        push = mx.zeros(result.shape)
        push[:, -3, feature] = 3 * mx.std(result)  # of one past token
        return result + push

    return disturb


def _readers(
    subject: Subject,
    attention: AttentionCall,
    projection: str,
    disturb: Callable[[mx.array], mx.array],
    heads: int,
    last_only: bool = False,
) -> list[int]:
    """Query heads whose results move when the output of a projection is disturbed.

    They are looked at in the input (B, T, H · head_dim) of the output projection, at all tokens
    or at the last one only.
    """
    output = attention.part(OUTPUTS)

    def results() -> np.ndarray:
        with recorded(subject.model, [output]) as heard:
            attention.again(attention.call.inputs)
        tokens = heard[0].inputs[:, -1:] if last_only else heard[0].inputs
        return np.array(tokens.astype(mx.float32))

    def disturbed(module, *args, **kwargs):
        return disturb(module(*args, **kwargs))

    before = results()
    with intercepted(subject.model, {projection: disturbed}):
        moved = np.abs(results() - before).max(axis=(0, 1))
    by_head = moved.reshape(heads, -1).max(axis=-1)
    return np.flatnonzero(by_head > subject.tolerance * float(np.abs(before).max())).tolist()
