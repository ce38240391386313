"""NaN and infinity, by path."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten


def not_finite(tree: object) -> list[str]:
    """Names of the arrays of a tree that hold NaN or infinity."""
    arrays = tree_flatten(tree)
    # A sum is finite only if all its terms are: one quick look clears almost every array.
    sums = [mx.isfinite(array.sum()) for _, array in arrays]
    mx.eval(sums)
    suspects = [pair for pair, finite in zip(arrays, sums) if not finite.item()]
    return [name for name, array in suspects if not mx.isfinite(array).all().item()]
