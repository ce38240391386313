"""Fingerprints of parameters: what moved, and what must not have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
