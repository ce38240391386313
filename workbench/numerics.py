"""NaN and infinity, by path."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from workbench.blocks import grouped, joined

JOINED_NUMBERS = 2**16  # that are copied together to be looked at, at most


def not_finite(tree: object) -> list[str]:
    """Names of the arrays of a tree that hold NaN or infinity."""
    pairs = tree_flatten(tree)
    kind, size = lambda pair: pair[1].dtype, lambda pair: pair[1].size
    groups = list(grouped(pairs, kind, size, JOINED_NUMBERS))
    # A sum is finite only if all its terms are: one quick look clears almost every group.
    sums = [mx.isfinite(joined([array for _, array in group]).sum()) for group in groups]
    mx.eval(sums)
    clear = {name for group, sum_ in zip(groups, sums) if sum_.item() for name, _ in group}
    suspects = [(name, array) for name, array in pairs if name not in clear]
    return [name for name, array in suspects if not mx.isfinite(array).all().item()]
