"""Blocks of numbers: many small arrays joined into one, a large one cut into rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import mlx.core as mx

UPDATE_NUMBERS = {"cpu": 2**18, "gpu": 2**22}  # in a block of an optimizer's update, at most

T = TypeVar("T")


def grouped(
    items: Iterable[T], kind: Callable[[T], Hashable], size: Callable[[T], int], limit: int
) -> Iterator[list[T]]:
    """The items in groups of one kind, in their order, of at most `limit` in size together.

    An item that is larger is a group by itself.
    """
    waiting: dict[Hashable, list[T]] = {}
    filled: dict[Hashable, int] = {}
    for item in items:
        key = kind(item)
        if key in waiting and filled[key] + size(item) > limit:
            yield waiting.pop(key)
        if key not in waiting:
            waiting[key], filled[key] = [], 0
        waiting[key].append(item)
        filled[key] += size(item)
    yield from waiting.values()


def joined(arrays: Sequence[mx.array]) -> mx.array:
    """(N,): the numbers of all the arrays, of one type; a single array stays as it is."""
    if len(arrays) == 1:
        return arrays[0]
    return mx.concatenate([array.reshape(-1) for array in arrays])


def parted(block: mx.array, shapes: Sequence[tuple[int, ...]]) -> list[mx.array]:
    """What `joined` took together: views of the block, which stays in memory with any of them."""
    if len(shapes) == 1:
        return [block]
    *ends, _ = itertools.accumulate(math.prod(shape) for shape in shapes)
    return [part.reshape(shape) for part, shape in zip(mx.split(block, ends), shapes)]


def in_rows(array: mx.array) -> mx.array:
    """(N, D), or (N,) of a vector; a matrix may lie as it likes, it is not copied."""
    return array.flatten(0, max(0, array.ndim - 2))


def rows_in_block(rows: int, numbers: int, limit: int) -> int:
    """How many of an array's rows make a block of at most `limit` numbers; one at least."""
    return max(1, limit * rows // numbers)
