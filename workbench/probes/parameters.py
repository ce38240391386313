"""Fingerprints of parameters: what moved, and what must not have."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def fingerprint(model: nn.Module) -> dict[str, str]:
    """sha256 of every parameter's dtype, shape and bytes, by name."""
    return {name: digest(array) for name, array in tree_flatten(model.parameters())}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names whose fingerprint differs, or that only one side has."""
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def digest(array: mx.array) -> str:
    """sha256 of an array's dtype, shape and bytes."""
    content = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    flat = mx.contiguous(array.reshape(-1))  # NumPy has no bfloat16; a scalar has no other view
    content.update(memoryview(np.array(flat.view(mx.uint8))))
    return content.hexdigest()


class WatchedWeights:
    """Notices when other weights take the place of those that something was computed from.

    They are hashed only when an array object is another. Writing into an array's elements in
    place is not noticed.

    Args:
        weights: (name, array) of each.
        others: what else the computation depends on; part of the key.
    """

    def __init__(self, weights: Sequence[tuple[str, mx.array]], *others: object):
        self._others = others
        self._note(weights)

    def replaced(self, weights: Sequence[tuple[str, mx.array]]) -> bool:
        """Whether these are of other content than those noted last; takes note of them."""
        if len(weights) == len(self._noted) and all(
            noted() is array for noted, (_, array) in zip(self._noted, weights)
        ):
            return False
        before = self.key
        self._note(weights)
        return self.key != before

    def _note(self, weights: Sequence[tuple[str, mx.array]]) -> None:
        # Weak, so that a reload can free what was there before.
        self._noted = [weakref.ref(array) for _, array in weights]
        named = [(name, digest(array)) for name, array in weights]
        self.key = hashlib.sha256(repr((named, *self._others)).encode()).hexdigest()
