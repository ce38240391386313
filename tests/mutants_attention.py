"""Broken attention: masks, rotary positions, grouped heads; and broken KV caches."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_map_with_path

from tests.toy import toy_model
from workbench.models.layers import Attention, KVCache
from workbench.models.llama import Llama
from workbench.models.rope import RotaryEmbedding


class OpenAttention(Attention):
    """The same attention, its steps as methods for a mutant to override."""

    def __call__(self, x, mask, cache=None):
        B, T, _ = x.shape
        queries = self.split(self.q_proj(x), self.num_heads)
        keys = self.split(self.k_proj(x), self.num_kv_heads)
        values = self.split(self.v_proj(x), self.num_kv_heads)
        queries, keys = self.rotate(queries, keys, cache.offset if cache is not None else 0)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        repeats = self.num_heads // self.num_kv_heads
        keys, values = self.group_keys(keys, repeats), self.group_values(values, repeats)
        attended = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.scale, mask=self.mask(mask, T, keys.shape[2])
        )
        return self.o_proj(attended.swapaxes(1, 2).reshape(B, T, -1))

    def split(self, x, heads):
        B, T, _ = x.shape
        return x.reshape(B, T, heads, -1).swapaxes(1, 2)

    def rotate(self, queries, keys, offset):
        return self.rope(queries, offset), self.rope(keys, offset)

    def group_keys(self, x, repeats):
        return mx.repeat(x, repeats, axis=1)

    def group_values(self, x, repeats):
        return mx.repeat(x, repeats, axis=1)

    def mask(self, mask, length, total):
        return mask


def with_attention(kind: type[Attention], model: Llama | None = None) -> Llama:
    """A toy whose attention modules are of another class, weights unchanged."""
    model = model or toy_model()
    for layer in model.layers:
        layer.self_attn.__class__ = kind
    return model


# 2: the causal mask


class ReversedMask(OpenAttention):
    def mask(self, mask, length, total):
        return mx.triu(mx.ones((length, total), dtype=mx.bool_), total - length)


class NoMask(OpenAttention):
    def mask(self, mask, length, total):
        return None


class SeesOneAhead(OpenAttention):
    def mask(self, mask, length, total):
        return mx.tril(mx.ones((length, total), dtype=mx.bool_), total - length + 1)


class SeesOnlyItself(OpenAttention):
    def mask(self, mask, length, total):
        return mx.arange(total) == mx.arange(total - length, total)[:, None]


class SeesTheLastTwo(OpenAttention):
    def mask(self, mask, length, total):
        band = mx.tril(mx.ones((total, total), dtype=mx.bool_))
        return mx.triu(band, -2)[total - length :]


class HidesItself(OpenAttention):
    def mask(self, mask, length, total):
        mask = mx.tril(mx.ones((length, total), dtype=mx.bool_), total - length - 1)
        return mx.where(mask, 0.0, -mx.inf)


# 3: rotary positions


class RotatesHeads(OpenAttention):
    def rotate(self, queries, keys, offset):
        over_heads = (self.rope(x.swapaxes(1, 2), offset).swapaxes(1, 2) for x in (queries, keys))
        return tuple(over_heads)


class ForgetsRotation(OpenAttention):
    def rotate(self, queries, keys, offset):
        return queries, keys


class IgnoresOffset(OpenAttention):
    def rotate(self, queries, keys, offset):
        return self.rope(queries, 0), self.rope(keys, 0)


class OffsetOnQueries(OpenAttention):
    def rotate(self, queries, keys, offset):
        return self.rope(queries, offset), self.rope(keys, 0)


class RotatesQueries(OpenAttention):
    def rotate(self, queries, keys, offset):
        return self.rope(queries, offset), keys


class Interleaved(RotaryEmbedding):
    def __call__(self, x, offset=0):
        return mx.fast.rope(
            x,
            self.dims,
            traditional=True,
            base=None,
            scale=self.scale,
            offset=offset,
            freqs=self.periods,
        )


def interleaved_rope() -> Llama:
    """Traditional RoPE on half-split weights."""
    model = toy_model()
    for layer in model.layers:
        layer.self_attn.rope.__class__ = Interleaved
    return model


def interleaved_weights(model: Llama | None = None) -> Llama:
    """Half-split RoPE on weights for the traditional one, as GGUF files have them."""
    model = model or toy_model()

    def permute(name, weight):
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return weight
        heads = weight.shape[0] // model.config.head_dim
        split = weight.reshape(heads, 2, model.config.head_dim // 2, -1)
        return split.swapaxes(1, 2).reshape(weight.shape)

    model.update(tree_map_with_path(permute, model.parameters()))
    return model


# 4: grouped-query heads


class TilesHeads(OpenAttention):
    def group_keys(self, x, repeats):
        return mx.tile(x, (1, repeats, 1, 1))

    group_values = group_keys


class TilesValues(OpenAttention):
    def group_values(self, x, repeats):
        return mx.tile(x, (1, repeats, 1, 1))


class JoinsOnBatchAxis(OpenAttention):
    def group_keys(self, x, repeats):
        B, KV, T, D = x.shape
        return mx.concatenate([x] * repeats, axis=0).reshape(B, KV * repeats, T, D)

    group_values = group_keys


class SwapsHeads(OpenAttention):
    def split(self, x, heads):
        B, T, _ = x.shape
        return x.reshape(B, T, -1, heads).transpose(0, 3, 1, 2)


def with_cache(kind: type[KVCache]) -> Llama:
    """A toy that makes another kind of cache."""

    class Cached(Llama):
        def make_cache(self, capacity=256):
            return [kind(capacity) for _ in self.layers]

    model = toy_model()
    model.__class__ = Cached
    return model


# 6: the KV cache


class KeepsTheLast(KVCache):
    def update_and_fetch(self, keys, values):
        self.offset += keys.shape[2]
        return keys, values


class JoinsOnHeads(KVCache):
    axis = 1

    def update_and_fetch(self, keys, values):
        self.offset += keys.shape[2]
        if self.keys is not None:
            keys = mx.concatenate([self.keys, keys], axis=self.axis)
            values = mx.concatenate([self.values, values], axis=self.axis)
        self.keys, self.values = keys, values
        return keys, values


class JoinsOnBatch(JoinsOnHeads):
    axis = 0


class WritesAtZero(KVCache):
    def update_and_fetch(self, keys, values):
        end, self.offset = self.offset + keys.shape[2], 0
        self._reserve(keys, values, end)
        self.keys[..., : keys.shape[2], :] = keys
        self.values[..., : keys.shape[2], :] = values
        self.offset = end
        return self.keys[..., :end, :], self.values[..., :end, :]


class SlicesFromZero(KVCache):
    def update_and_fetch(self, keys, values):
        length = keys.shape[2]
        keys, values = super().update_and_fetch(keys, values)
        return keys[..., :length, :], values[..., :length, :]


class NeverAdvances(KVCache):
    def update_and_fetch(self, keys, values):
        keys, values = super().update_and_fetch(keys, values)
        self.offset = 0
        return keys, values


class KeysOnly(KVCache):
    def update_and_fetch(self, keys, values):
        past = self.offset
        keys, all_values = super().update_and_fetch(keys, values)
        return keys, mx.concatenate([all_values[..., :past, :] * 0, values], axis=2)
