"""Attention and SwiGLU in two forms: the readable one, and one for MLX's CPU backend on Linux.

There, MLX takes `mx.exp` and what rests on it 12 ns a number, a conditional 4 ns, a product 0.2 ns
(2 cores, mlx 0.32.4). The fast forms take exponentials by `mx.power`, 4 ns, and far fewer of them:
attention leaves out the keys that a block of queries cannot see, and both write their gradients
by hand, from what the forward pass has kept. Of long sequences attention keeps no probabilities,
and computes them again, a block at a time. Float32 only; results agree within 1e-5 relative.
Elsewhere, MLX has kernels of its own and the readable forms are used.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator

import mlx.core as mx

QUERIES = 64  # of a block: smaller ones see fewer keys in vain, larger ones are fewer products
HIDDEN = -1e9  # at most the score of a key that a query must not see
KEPT_BYTES = 32_000_000  # of a call's probabilities; more are computed again for the gradient
UNIT = 64.0  # of exponents below: e to its power is rounded once, e itself at each of 64 times
LOWEST = -80.0  # exponent: its power is 2e-35, and numbers below 1e-38 are slow to compute with

_plain = False


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Use the readable forms for the length of a `with` block."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """softmax(queries @ keysᵀ · scale) @ values, each key/value head serving H / KV query heads.

    Args:
        queries: (B, H, T, D), the last T of S positions.
        keys, values: (B, KV, S, D).
        scale: factor on the scores.
        mask: "causal"; None for all keys; or boolean (..., T, S), True where a key is seen.

    Returns:
        (B, H, T, D).
    """
    if isinstance(mask, str) and is_fast(queries, keys, values):
        return _causal_attention(scale)(queries, keys, values)[0]
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def silu_product(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, element by element, with silu(x) = x · sigmoid(x)."""
    if is_fast(gate, up):
        return _fast_silu_product(gate, up)[0]
    return gate * mx.sigmoid(gate) * up


def exponential(x: mx.array, unit: float = 1.0) -> mx.array:
    """e to the power of unit · x, for float32 x; relative error about 1e-7 · max(1, |x|)."""
    return mx.power(math.exp(unit), x) if is_fast(x) else mx.exp(unit * x)


def is_fast(*arrays: mx.array) -> bool:
    """Whether the forms for MLX's CPU backend on Linux are to be used for these arrays."""
    on_cpu = sys.platform == "linux" and mx.default_device().type == mx.cpu
    return on_cpu and not _plain and all(array.dtype == mx.float32 for array in arrays)


@mx.custom_function
def _fast_silu_product(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """The product, and sigmoid(gate) for the gradient."""
    sigmoid = 1 / (1 + exponential(gate * (-1 / UNIT), UNIT))
    return gate * sigmoid * up, sigmoid


@_fast_silu_product.vjp
def _silu_product_gradients(primals: tuple, flows: tuple, outputs: tuple) -> tuple:
    (gate, up), flow, sigmoid = primals, flows[0], outputs[1]
    silu = gate * sigmoid
    return flow * up * (sigmoid + silu * (1 - sigmoid)), flow * silu


@functools.cache
def _causal_attention(scale: float) -> Callable:
    """(queries, keys, values) → attended, and what its gradient needs.

    That is each block's probabilities, or, where they would be large, each row's highest score
    and 1 / sum.
    """
    attention = mx.custom_function(functools.partial(_attended, scale))
    attention.vjp(functools.partial(_attention_gradients, scale))
    return attention


def keeps_probabilities(queries: tuple[int, ...], keys: tuple[int, ...]) -> bool:
    """Whether the gradient uses probabilities that the forward pass has kept.

    Args:
        queries: (B, H, T, D), a shape.
        keys: (B, KV, S, D).
    """
    (B, H, T, _), S = queries, keys[2]
    return 4 * B * H * T * (S - T // 2) <= KEPT_BYTES


def _attended(scale: float, queries: mx.array, keys: mx.array, values: mx.array) -> tuple:
    """A block holds the same positions of the R query heads that share a key/value head.

    They are one matrix of R · positions rows.
    """
    grouped, before = _grouped(queries, keys), keys.shape[2] - queries.shape[2]
    keeps = keeps_probabilities(queries.shape, keys.shape)
    attended, kept, sums = [], [], []
    for start, end in _blocks(queries.shape[2]):
        block, seen = grouped[:, :, :, start:end], before + end
        if attended and not keeps:
            block = _after(block, attended[-1])
        weights, highest = _weights(scale, block, keys[:, :, :seen])
        share = 1 / weights.sum(axis=-1, keepdims=True)
        if keeps:
            kept.append(weights * share)
            attended.append(_split(_rows(kept[-1]) @ values[:, :, :seen], block))
        else:
            attended.append(_split(_rows(weights) @ values[:, :, :seen], block) * share)
            sums.append((highest, share))
    if not keeps:
        kept = [mx.concatenate(parts, axis=3) for parts in zip(*sums)]
    return mx.concatenate(attended, axis=3).reshape(queries.shape), *kept


def _weights(
    scale: float, queries: mx.array, keys: mx.array, highest: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """exp(scores - highest) of a block (B, KV, R, T, D) and the S keys that its last row sees.

    Returns:
        (B, KV, R, T, S), and each row's highest score / UNIT (B, KV, R, T, 1), if not given.
    """
    visible = _visible(queries.shape[3], keys.shape[2])
    scores = _split(_rows((scale / UNIT) * queries) @ keys.swapaxes(-1, -2), queries)
    scores = mx.minimum(scores, mx.where(visible, math.inf, HIDDEN))
    highest = scores.max(axis=-1, keepdims=True) if highest is None else highest
    return exponential(mx.maximum(scores - highest, LOWEST / UNIT), UNIT) * visible, highest


def _attention_gradients(scale: float, primals: tuple, flows: tuple, outputs: tuple) -> tuple:
    """Dao et al. 2022, FlashAttention, appendix B.2: row sums of P · dP are those of O · dO."""
    queries, keys, values = primals
    grouped, flow = _grouped(queries, keys), _grouped(flows[0], keys)
    row_sums = (flow * _grouped(outputs[0], keys)).sum(axis=-1, keepdims=True)
    keeps = keeps_probabilities(queries.shape, keys.shape)
    by_queries, by_keys, by_values = [], None, None
    for number, (start, end) in enumerate(_blocks(queries.shape[2])):
        block, pulled = grouped[:, :, :, start:end], _rows(flow[:, :, :, start:end])
        seen = keys.shape[2] - queries.shape[2] + end
        if keeps:
            chances = outputs[1 + number]
        else:
            if by_queries:
                block, pulled = mx.depends([block, pulled], [by_queries[-1], by_keys, by_values])
            highest, share = (kept[:, :, :, start:end] for kept in outputs[1:])
            chances = _weights(scale, block, keys[:, :, :seen], highest)[0] * share
        slopes = _split(pulled @ values[:, :, :seen].swapaxes(-1, -2), block)
        slopes = _rows(chances * (slopes - row_sums[:, :, :, start:end]))
        by_queries.append(_split(slopes @ keys[:, :, :seen], block))
        by_keys = _added(by_keys, slopes.swapaxes(-1, -2) @ _rows(block))
        by_values = _added(by_values, _rows(chances).swapaxes(-1, -2) @ pulled)
    by_queries = scale * mx.concatenate(by_queries, axis=3).reshape(queries.shape)
    return by_queries, scale * by_keys, by_values


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES)]


def _grouped(queries: mx.array, keys: mx.array) -> mx.array:
    """(B, H, T, D) → (B, KV, R, T, D)."""
    B, H, T, D = queries.shape
    return queries.reshape(B, keys.shape[1], H // keys.shape[1], T, D)


def _rows(x: mx.array) -> mx.array:
    """(B, KV, R, T, D) → (B, KV, R · T, D)."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _split(x: mx.array, like: mx.array) -> mx.array:
    """(B, KV, R · T, S) → (B, KV, R, T, S), with R and T of another array."""
    return x.reshape(*like.shape[:4], x.shape[-1])


def _added(total: mx.array | None, more: mx.array) -> mx.array:
    """Sum of two (B, KV, S, D); the first has fewer positions, and zeros beyond."""
    if total is None:
        return more
    seen = total.shape[2]
    return mx.concatenate([total + more[:, :, :seen], more[:, :, seen:]], axis=2)


def _visible(length: int, seen: int) -> mx.array:
    """(T, S): whether one of the last T positions sees a key."""
    return mx.arange(seen)[None, :] <= mx.arange(seen - length, seen)[:, None]


def _after(x: mx.array, other: mx.array) -> mx.array:
    # Nothing else keeps MLX from computing the scores of several blocks before it uses them.
    return mx.depends([x], [other])[0]
