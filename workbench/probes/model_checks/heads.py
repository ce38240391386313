"""Grouped-query attention: which query heads read which key/value head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.attention import (
    KEYS,
    OUTPUTS,
    VALUES,
    AttentionCall,
    attention_calls,
    heads_moved_by,
)
from workbench.probes.model_checks.subject import Subject
from workbench.probes.recording import recorded

TILED = ("plamo",)  # model_type of checkpoints that were trained with tiled heads
CLEARLY = 0.05  # of the largest change: a head that moves less has not been read


def check_grouped_heads(subject: Subject) -> Iterator[Finding]:
    """Heading "grouped heads": query head h reads key/value head h // (H / KV).

    The convention of Hugging Face's checkpoints. The features of one key or value head are
    disturbed; the query heads that move must be its group (Ainslie et al. 2023, section 2.2).
    """
    found = [a for a in attention_calls(subject) if a.part(VALUES) and a.part(OUTPUTS)]
    if not found:
        yield not_applicable(
            "grouped heads", "no attention module has value and output projections of its own"
        )
        return
    for attention in (found[0], found[-1])[: len(found)]:
        dims = head_dims(subject, attention)
        if dims is None:
            yield not_applicable("grouped heads", f"the head count of {attention.path} is unknown")
            return
        problem = _wrong_group(subject, attention, *dims)
        if problem is not None:
            yield problem
            return
    heads, kv_heads, _ = dims
    yield passed("grouped heads", f"{heads} query heads read {kv_heads} key/value heads in order")


def head_dims(subject: Subject, attention: AttentionCall) -> tuple[int, int, int] | None:
    """(query heads, key/value heads, head_dim) of an attention module; None if they are unknown."""
    value, output = attention.part(VALUES), attention.part(OUTPUTS)
    heads = subject.setting("num_attention_heads", "n_heads", "n_head", "num_heads")
    if not isinstance(heads, int) or value is None or output is None:
        return None
    with recorded(subject.model, [value, output]) as heard:
        attention.again(attention.call.inputs)
    widths = {call.path: call.result.shape[-1] for call in heard if call.path == value}
    widths |= {call.path: call.inputs.shape[-1] for call in heard if call.path == output}
    if set(widths) != {value, output} or widths[output] % heads:
        return None
    head_dim = widths[output] // heads
    if widths[value] % head_dim or heads % (widths[value] // head_dim):
        return None
    return heads, widths[value] // head_dim, head_dim


def _wrong_group(
    subject: Subject, attention: AttentionCall, heads: int, kv_heads: int, head_dim: int
) -> Finding | None:
    group, tiled = heads // kv_heads, subject.setting("model_type") in TILED
    for kind, names in (("value", VALUES), ("key", KEYS)):
        projection = attention.part(names)
        for kv_head in range(kv_heads) if projection else ():
            feature = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
            moved = heads_moved_by(subject, attention, projection, feature, head_dim)
            readers = np.flatnonzero(moved > CLEARLY * moved.max()).tolist()
            repeated = range(kv_head * group, (kv_head + 1) * group)
            expected = list(range(kv_head, heads, kv_heads) if tiled else repeated)
            if readers != expected:
                return failed(
                    "grouped heads",
                    f"{attention.path}: {kind} head {kv_head} is read by query heads {readers}, "
                    f"expected {expected}",
                    "key/value heads are tiled (0 1 2 0 1 2) where they must be repeated "
                    "(0 0 1 1 2 2), or heads and features are swapped in a reshape",
                )
    return None
