"""Numbers that went wrong, by the name of the array that holds them."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten


def not_finite(tree: object) -> list[str]:
    """Names of the arrays in a tree that hold NaN or infinity."""
    checks = [(name, mx.isfinite(array).all()) for name, array in tree_flatten(tree)]
    mx.eval([ok for _, ok in checks])
    return [name for name, ok in checks if not ok.item()]
