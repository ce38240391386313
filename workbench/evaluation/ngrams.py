"""A baseline that counts: how likely a byte is after the few bytes before it.

Interpolated Kneser-Ney smoothing (Kneser and Ney 1995, in the form of Chen and Goodman 1999, An
empirical study of smoothing techniques for language modeling, section 2.7), over bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workbench.errors import ConfigError, DataError, check_whole, is_text

MAX_ORDER = 40  # bytes of an n-gram
MAX_TEXT_BYTES = 8_000_000  # counting takes some hundred bytes of memory a byte
NUM_BYTES = 256
OUTSIDE = NUM_BYTES  # stands before the first byte of a text
CHECK_SHARE = 10  # one byte in so many of the text, its last ones, chooses the order


@dataclass(frozen=True, eq=False)
class _Counts:
    """Counts of the n-grams of one order, by number of the n-gram and of its context."""

    counts: np.ndarray  # (G,)
    totals: np.ndarray  # (C,) sums over the bytes after a context
    kinds: np.ndarray  # (C,) different bytes after it
    discount: float  # in (0, 1)

    def smoothed(self, grams: np.ndarray, contexts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Probabilities (N,), given those of the order below; -1 stands for what was never seen.

        (count − D + D · kinds · p_shorter) / total, without "count − D" where the count is zero.
        """
        seen, known = grams >= 0, contexts >= 0
        left = np.where(seen, self.counts[grams] - self.discount, 0.0)
        share = self.discount * self.kinds[contexts] * shorter
        return np.where(known, (left + share) / self.totals[contexts], shorter)


@dataclass(frozen=True, eq=False)
class _Level:
    """What was counted of one order."""

    gram_keys: np.ndarray  # (G,) context · 256 + byte, sorted
    context_keys: np.ndarray  # (C',) of contexts one byte longer: context · 257 + that byte, sorted
    plain: _Counts  # how often: what the highest order goes by
    continued: _Counts | None  # after how many different bytes: all orders below it


@dataclass(frozen=True, eq=False)
class NgramModel:
    """Probabilities of bytes, from counts of a text; `fit_ngrams` makes it."""

    order: int  # bytes of the longest n-gram: the byte itself, and those before it
    levels: tuple[_Level, ...] = field(repr=False)
    tried: tuple[float, ...] = ()  # bits a byte of each order, from 1, where the order was chosen

    def log2_probs(self, text: str | bytes) -> np.ndarray:
        """log2 p of every byte of a text, given the bytes before it: (N,)."""
        return np.log2(_probabilities(self.levels, _as_bytes(text))[-1])

    def bits_per_byte(self, text: str) -> float:
        """−Σ log2 p over the bytes of a text, divided by their number."""
        return float(-self.log2_probs(text).mean())

    def __str__(self) -> str:
        return f"{self.order}-grams of bytes, interpolated Kneser-Ney"


def fit_ngrams(text: str, max_order: int = MAX_ORDER) -> NgramModel:
    """Count a text; of the orders, take that which best foretells its last tenth from the rest.

    Raises:
        DataError: no text, fewer than 20 bytes, or more than 8 MB.
        ConfigError: max_order is not a whole number from 1 to 40.
    """
    _check_order("max_order", max_order)
    data = _as_bytes(text)
    if len(data) < 2 * CHECK_SHARE:
        raise DataError(f"{len(data)} bytes are too few", cure="Give 20 bytes or more.")
    cut = len(data) - len(data) // CHECK_SHARE
    found = _probabilities(_count(data[:cut], max_order), data[cut:])
    tried = tuple(float(-np.log2(probabilities).mean()) for probabilities in found)
    order = int(np.argmin(tried)) + 1
    return NgramModel(order, tuple(_count(data, order)), tried)


def count_ngrams(text: str | bytes, order: int) -> NgramModel:
    """Count a text up to a given order.

    Raises:
        DataError, ConfigError: as `fit_ngrams`; a single byte is enough.
    """
    _check_order("order", order)
    return NgramModel(order, tuple(_count(_as_bytes(text), order)))


def _check_order(name: str, order: int) -> None:
    check_whole(name, order, 1)
    if order > MAX_ORDER:
        raise ConfigError(f"{name} must be at most {MAX_ORDER}, got {order}")


def _as_bytes(text: str | bytes) -> np.ndarray:
    if is_text(text):
        text = text.encode()
    if not isinstance(text, bytes) or not text:
        raise DataError("must be a text that UTF-8 can hold, and not empty")
    if len(text) > MAX_TEXT_BYTES:
        raise DataError(f"has {len(text):,} bytes, {MAX_TEXT_BYTES:,} can be counted")
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


def _byte_before(data: np.ndarray, distance: int) -> np.ndarray:
    """What stands so many bytes before each byte: (N,)."""
    start = np.full(min(distance, len(data)), OUTSIDE)
    return np.concatenate([start, data[: len(data) - len(start)]])


def _count(data: np.ndarray, order: int) -> list[_Level]:
    """Every level from 1 to an order; contexts grow by one byte to the left."""
    contexts, num_contexts, levels, rows = np.zeros_like(data), 1, [], []
    for length in range(1, order + 1):
        keys, first, grams, counts = np.unique(
            contexts * NUM_BYTES + data,
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        if rows:  # an n-gram's parent is itself without its first byte
            parents = rows[-1][2][first]
            rows[-1] = (*rows[-1], np.bincount(parents, minlength=len(rows[-1][0])))
        longer = contexts * (NUM_BYTES + 1) + _byte_before(data, length)
        context_keys, next_contexts = np.unique(longer, return_inverse=True)
        rows.append((keys, (context_keys, num_contexts, counts), grams))
        contexts, num_contexts = next_contexts, len(context_keys)
    for keys, (context_keys, size, counts), _, *continued in rows:
        owners = keys // NUM_BYTES
        tables = [_table(owners, size, each) for each in (counts, *continued)]
        levels.append(_Level(keys, context_keys, *tables, *([None] * (2 - len(tables)))))
    return levels


def _table(owners: np.ndarray, num_contexts: int, counts: np.ndarray) -> _Counts:
    """Counts with their sums, and D = n1 / (n1 + 2 n2) (Ney, Essen and Kneser 1994, section 3).

    n1 and n2 are the n-grams counted once and twice, one added to each: D stays inside (0, 1).
    """
    once, twice = (int((counts == number).sum()) + 1 for number in (1, 2))
    totals = np.bincount(owners, weights=counts, minlength=num_contexts)
    kinds = np.bincount(owners, minlength=num_contexts)
    return _Counts(counts, totals, kinds, once / (once + 2 * twice))


def _probabilities(levels: list[_Level] | tuple[_Level, ...], data: np.ndarray) -> list[np.ndarray]:
    """Of every byte, by n-grams of each order from 1, as the highest: (N,) each."""
    shorter, found = np.full(len(data), 1 / NUM_BYTES), []
    contexts = np.zeros_like(data)
    for length, level in enumerate(levels, 1):
        grams = _look_up(level.gram_keys, contexts, contexts * NUM_BYTES + data)
        found.append(level.plain.smoothed(grams, contexts, shorter))
        if level.continued is not None:
            shorter = level.continued.smoothed(grams, contexts, shorter)
        longer = contexts * (NUM_BYTES + 1) + _byte_before(data, length)
        contexts = _look_up(level.context_keys, contexts, longer)
    return found


def _look_up(keys: np.ndarray, contexts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places of keys among the sorted ones; -1 for one that is not there, or of no context."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((contexts >= 0) & (keys[places] == wanted), places, -1)
