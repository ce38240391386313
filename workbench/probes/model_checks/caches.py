"""With a KV cache the model must say what it says without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.subject import CallFailedError, Subject


def check_cache(subject: Subject) -> Iterator[Finding]:
    """Heading "cache": prefill, chunks and token by token, for one row and for two."""
    if subject.make_cache() is None:
        yield not_applicable("cache", "the model's call takes no cache, or has no make_cache()")
        return
    length = subject.tokens().shape[1]
    ways = {
        "prefill at once": [length],
        "in chunks": _sizes(length, 5),
        "prefill, then token by token": [length // 2] + [1] * (length - length // 2),
        "token by token": [1] * length,
    }
    worst = 0.0
    for rows in (1, 2):
        tokens = subject.tokens(rows)
        plain = subject.logits(tokens)
        for name, sizes in ways.items():
            try:
                cached = in_pieces(subject, tokens, sizes)
            except CallFailedError as error:
                yield failed("cache", f"{name}, batch of {rows}: {error}", _cause(rows))
                return
            moved = np.abs(cached - plain).max(axis=(0, 2)) / (np.abs(plain).max() or 1.0)
            worst = max(worst, float(moved.max()))
            if moved.max() > subject.tolerance:
                position = int(np.flatnonzero(moved > subject.tolerance)[0])
                yield failed(
                    "cache",
                    f"{name}, batch of {rows}: logits from position {position} on differ by "
                    f"{moved.max():.2g} of the largest from those without a cache",
                    _cause(rows),
                )
                return
    yield passed("cache", f"{', '.join(ways)}: equal to no cache (at most {worst:.1e})")
    if subject.window and subject.window >= length:
        yield not_applicable(
            "cache", f"beyond its window of {subject.window}: rows of {length} do not reach it"
        )


def in_pieces(subject: Subject, tokens: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Logits (B, T, V) of tokens handed to the model piece by piece, with one cache."""
    cache, start, pieces = subject.make_cache(), 0, []
    for size in sizes:
        pieces.append(subject.logits(tokens[:, start : start + size], cache=cache))
        start += size
    return np.concatenate(pieces, axis=1)


def _sizes(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def _cause(rows: int) -> str:
    if rows > 1:
        return "one row is right and two are not: the cache is joined on the batch or head axis"
    return (
        "the cache drops, overwrites or joins past keys on a wrong axis, its mask is built for "
        "the new tokens only, or RoPE ignores the offset"
    )
