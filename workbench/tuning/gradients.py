"""What happens to gradients between the backward pass and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from workbench.blocks import UPDATE_NUMBERS, grouped, in_rows, joined, rows_in_block


def clip_by_global_norm(
    gradients: dict, max_norm: float, num_tokens: int = 1
) -> tuple[dict, mx.array]:
    """Scale gradients down to a global L2 norm of at most `max_norm` (Pascanu et al. 2013).

    Args:
        gradients: a tree, of the mean loss or of a sum over tokens.
        max_norm: 0 does not clip.
        num_tokens: that the sum is divided by, here and nowhere else.

    Returns:
        The gradients of the mean, and their norm before clipping.
    """
    norm = mx.sqrt(sum(_sums_of_squares(gradients), start=mx.array(0.0))) / num_tokens
    factor = mx.array(1.0)
    if max_norm:
        factor = mx.minimum(1.0, max_norm / (norm + 1e-12))
    factor = factor / num_tokens
    return tree_map(lambda g: g * factor.astype(g.dtype), gradients), norm


def _sums_of_squares(gradients: dict) -> Iterator[mx.array]:
    """In blocks, so that no large gradient is squared as a whole."""
    arrays = [array for _, array in tree_flatten(gradients)]
    limit = UPDATE_NUMBERS[mx.default_device().type.name]
    for group in grouped(arrays, lambda array: array.dtype, lambda array: array.size, limit):
        rows = in_rows(joined(group))
        step = rows_in_block(len(rows), max(1, rows.size), limit)
        for start in range(0, len(rows), step):
            block = rows[start : start + step].astype(mx.float32)  # float16 would overflow at 256
            yield block.square().sum()
