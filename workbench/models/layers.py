"""Attention, the KV cache and the feed-forward layer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import WorkbenchError
from workbench.models.forms import attend, silu_product
from workbench.models.rope import RotaryEmbedding
from workbench.models.shared_prompt import SharedPrompt

CACHE_BLOCK = 256  # positions by which a KV cache grows at least


class KVCache:
    """Keys and values of the positions seen so far, in buffers that are allocated ahead.

    Appending writes into the buffer's next positions on the sequence axis; the past is copied
    only when the buffer doubles, so the cost of a token does not grow with the length.

    Args:
        capacity: positions to allocate at the first append.
    """

    def __init__(self, capacity: int = CACHE_BLOCK):
        self.capacity = capacity
        self.offset = 0
        self.keys: mx.array | None = None  # (B, H, capacity, D)
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, H, T, D); return all of them (B, H, offset + T, D).

        Raises:
            WorkbenchError: batch, heads, head_dim or length do not fit each other or the past.
        """
        self._check(keys, values)
        end = self.offset + keys.shape[2]
        self._reserve(keys, values, end)
        self.keys[..., self.offset : end, :] = keys
        self.values[..., self.offset : end, :] = values
        self.offset = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """The buffers of keys and values, to be evaluated."""
        return self.keys, self.values

    def is_trimmable(self) -> bool:
        """Whether the last positions can be forgotten; they can."""
        return True

    def trim(self, count: int) -> None:
        """Forget the last positions."""
        self.offset -= count

    def keep_rows(self, rows: mx.array) -> None:
        """Drop all but these rows of the batch; `rows` are their numbers, in the new order."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        mx.eval(self.state)  # one layer's old buffers at a time

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise WorkbenchError(
                f"keys {keys.shape} and values {values.shape} must agree in (batch, heads, length)"
            )
        if self.keys is None:
            return
        for name, new, past in (("keys", keys, self.keys), ("values", values, self.values)):
            if (new.shape[:2], new.shape[3]) != (past.shape[:2], past.shape[3]):
                expected = (*past.shape[:2], "any", past.shape[3])
                raise WorkbenchError(
                    f"{name} of shape {new.shape} do not continue a cache of "
                    f"(batch, heads, length, head_dim) = {expected}",
                    cure="Use a new cache for a new batch.",
                )

    def _reserve(self, keys: mx.array, values: mx.array, end: int) -> None:
        held = 0 if self.keys is None else self.keys.shape[2]
        if end <= held:
            return
        length = max(self.capacity, end, 2 * held)
        self.keys = _grown(self.keys, keys, length, self.offset)
        self.values = _grown(self.values, values, length, self.offset)


def _grown(past: mx.array | None, like: mx.array, length: int, used: int) -> mx.array:
    B, H, _, D = like.shape
    buffer = mx.zeros((B, H, length, D), dtype=like.dtype)
    if past is not None:
        buffer[..., :used, :] = past[..., :used, :]
    return buffer


def causal_mask(length: int, offset: int = 0, padding: mx.array | None = None) -> mx.array:
    """Boolean mask: True where a query may see a key.

    Args:
        length: number of queries T, at positions [offset : offset + T].
        offset: number of keys before the first query.
        padding: (B,) number of padding tokens on the left of each row; keys there are hidden.

    Returns:
        (T, offset + T), or (B, 1, T, offset + T) with padding.
    """
    queries = mx.arange(offset, offset + length)[:, None]
    keys = mx.arange(offset + length)[None, :]
    mask = keys <= queries
    if padding is None:
        return mask
    visible = keys >= padding[:, None, None, None]
    # A padding query sees itself: a row with nothing to see would give NaN, and spread it.
    return (mask & visible) | (keys == queries)


class HeadLinear(nn.Linear):
    """A linear layer; where it trains, the gradient of its weight lies in memory by rows.

    MLX's own lies by columns, and what reads it beside the weight is ten times slower on a CPU:
    for a head of 28 million numbers 190 ms an operation against 16.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) → (..., out)."""
        if "weight" in self._no_grad:
            return super().__call__(x)
        output = _project(x, self.weight)
        return output + self.bias if "bias" in self else output


@mx.custom_function
def _project(x: mx.array, weight: mx.array) -> mx.array:
    """x (..., in), weight (out, in) → (..., out)."""
    return x @ weight.T


@_project.vjp
def _project_gradients(primals: tuple, flow: mx.array, output: mx.array) -> tuple:
    x, weight = primals
    rows = x.reshape(-1, x.shape[-1])
    return flow @ weight, flow.reshape(-1, flow.shape[-1]).T @ rows


class RotaryAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): a key/value head serves H / KV query heads.

    Between the projections, which a network names as its checkpoints do: heads, rotary positions,
    the KV cache.

    Args:
        config: with num_attention_heads, num_key_value_heads and head_dim.
        rope: rotates queries and keys.
    """

    def __init__(self, config: object, rope: RotaryEmbedding):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale, self.rope = config.head_dim**-0.5, rope

    def attended(
        self,
        mask: mx.array | str | SharedPrompt | None,
        cache: KVCache | None,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
    ) -> mx.array:
        """Projected (B, T, heads · head_dim) of each → that of the queries."""
        if isinstance(mask, SharedPrompt):
            return self._attend_shared(mask, queries, keys, values)
        return self._attend(mask, cache, queries, keys, values)

    def _attend(
        self,
        mask: mx.array | str | None,
        cache: KVCache | None,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
    ) -> mx.array:
        """Rotate, attend: (B, T, heads · head_dim) of each → that of the queries."""
        offset = cache.offset if cache is not None else 0
        queries, keys, values = self._in_heads(queries, keys, values, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return _flat(attend(queries, keys, values, self.scale, mask))

    def _attend_shared(
        self, shared: SharedPrompt, queries: mx.array, keys: mx.array, values: mx.array
    ) -> mx.array:
        """The same for a packed batch: (1, N, heads · head_dim) of each."""
        first, own = zip(*map(shared.split, (queries, keys, values)))
        first, own = self._in_heads(*first, 0), self._in_heads(*own, shared.length)
        seen = [
            mx.concatenate([mx.broadcast_to(f, (shared.rows, *f.shape[1:])), o], axis=2)
            for f, o in zip(first[1:], own[1:])
        ]
        begin = _flat(attend(*first, self.scale, "causal"))
        return shared.join(begin, _flat(attend(own[0], *seen, self.scale, "causal")))

    def _in_heads(
        self, queries: mx.array, keys: mx.array, values: mx.array, offset: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        """(B, T, heads · D) → (B, heads, T, D), queries and keys rotated from `offset` on."""
        queries = self.rope(self._heads(queries, self.num_heads), offset)
        keys = self.rope(self._heads(keys, self.num_kv_heads), offset)
        return queries, keys, self._heads(values, self.num_kv_heads)

    def _heads(self, x: mx.array, count: int) -> mx.array:
        B, T, _ = x.shape
        return x.reshape(B, T, count, -1).swapaxes(1, 2)


class Attention(RotaryAttention):
    """A Llama's attention: its projections under Hugging Face's names."""

    def __init__(self, config):
        rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.max_position_embeddings, config.rope_scaling
        )
        super().__init__(config, rope)
        dim, bias = config.hidden_size, config.attention_bias
        queries, keys = (n * config.head_dim for n in (self.num_heads, self.num_kv_heads))
        self.q_proj = nn.Linear(dim, queries, bias=bias)
        self.k_proj = nn.Linear(dim, keys, bias=bias)
        self.v_proj = nn.Linear(dim, keys, bias=bias)
        self.o_proj = nn.Linear(queries, dim, bias=bias)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | SharedPrompt | None,
        cache: KVCache | None = None,
    ) -> mx.array:
        """x (B, T, hidden_size) → the same shape."""
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.attended(mask, cache, *projected))


def at_places(x: mx.array, places: mx.array) -> mx.array:
    """x (B, T, D) → (N, D) at N places in the B · T positions."""
    return x.reshape(-1, x.shape[-1])[mx.stop_gradient(places)]  # checkpointing asks for gradients


def _flat(x: mx.array) -> mx.array:
    """(B, H, T, D) → (B, T, H · D)."""
    B, _, T, _ = x.shape
    return x.swapaxes(1, 2).reshape(B, T, -1)


class SwiGLU(nn.Module):
    """The gated feed-forward layer: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        dim, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """x (B, T, hidden_size) → the same shape."""
        return self.down_proj(silu_product(self.gate_proj(x), self.up_proj(x)))
