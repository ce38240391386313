"""What happens to gradients between the backward pass and the optimizer."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_map, tree_reduce


def clip_by_global_norm(gradients: dict, max_norm: float) -> tuple[dict, mx.array]:
    """Scale gradients down to a global L2 norm of at most `max_norm` (Pascanu et al. 2013).

    Returns:
        The gradients, and the norm before clipping. A `max_norm` of 0 does not clip.
    """
    squares = tree_reduce(lambda sum_, g: sum_ + _sum_of_squares(g), gradients, mx.array(0.0))
    norm = mx.sqrt(squares)
    if not max_norm:
        return gradients, norm
    factor = mx.minimum(1.0, max_norm / (norm + 1e-12))
    return tree_map(lambda g: g * factor.astype(g.dtype), gradients), norm


def _sum_of_squares(gradient: mx.array) -> mx.array:
    return gradient.astype(mx.float32).square().sum()  # float16 would overflow at 256
