"""What our networks have in common: tokens on their way through a stack of decoder layers.

A network says what enters the first layer (`embed`), which layers there are (`layers`), and what
becomes of the states that leave the last one (`head`). The rest stands here: the cache, padding,
a part of the layers, some places only, and rows that share what they begin with.
"""

from __future__ import annotations

import functools
import inspect

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.models.layers import KVCache, at_places, causal_mask
from workbench.models.shared_prompt import SharedPrompt


class Decoder(nn.Module):
    """logits = head(backbone(tokens))."""

    def __call__(
        self,
        tokens: mx.array,
        cache: list[KVCache] | None = None,
        padding: mx.array | None = None,
    ) -> mx.array:
        """tokens (B, T) → logits (B, T, V)."""
        return self.head(self.backbone(tokens, cache, padding))

    def backbone(
        self,
        tokens: mx.array,
        cache: list[KVCache] | None = None,
        padding: mx.array | None = None,
    ) -> mx.array:
        """Embedding and layers, without the final norm: tokens (B, T) → hidden_states (B, T, D).

        Args:
            tokens: ids; with a cache, those that follow the positions it holds.
            cache: one `KVCache` a layer, which is extended.
            padding: (B,) number of padding tokens on the left of each row.
        """
        return self.run_layers(self.embed(tokens), cache, padding)

    def states_at(
        self, tokens: np.ndarray, places: np.ndarray, shared: SharedPrompt | None = None
    ) -> mx.array:
        """What the backbone gives at some positions; the last layer ends at these only.

        Args:
            tokens: (B, T) ids.
            places: (N,) whole numbers in [0, B · T).
            shared: of these tokens, if what the rows begin with shall be computed once.

        Returns:
            Hidden states (N, D).
        """
        hidden_states, length = self.embed(mx.array(tokens)), tokens.shape[1]
        if shared is not None:
            places, hidden_states = shared.places(places, length), shared.pack(hidden_states)
        elif len(places) == tokens.size:
            return self.run_layers(hidden_states).reshape(tokens.size, -1)
        return self.run_layers(hidden_states, shared=shared, places=mx.array(places))

    def run_layers(
        self,
        hidden_states: mx.array,
        cache: list[KVCache] | None = None,
        padding: mx.array | None = None,
        *,
        first: int = 0,
        end: int | None = None,
        shared: SharedPrompt | None = None,
        places: mx.array | None = None,
    ) -> mx.array:
        """Layers [first : end]: hidden_states (B, T, D) that enter `first` → those that leave.

        Args:
            hidden_states: packed, (1, N, D), with `shared`.
            cache, padding: as for `backbone`.
            first, end: numbers of layers; there may be none between them.
            shared: the layout of a packed batch.
            places: (N,) places in B · T that alone are wanted, so that (N, D) is returned.
        """
        offset = cache[0].offset if cache else 0
        mask = shared or _attention_mask(hidden_states.shape[1], offset, padding)
        caches = cache or [None] * len(self.layers)
        run = list(zip(self.layers, caches))[first:end]
        for number, (layer, layer_cache) in enumerate(run, start=1):
            if number == len(run) and places is not None and _takes_places(type(layer)):
                return layer(hidden_states, mask, layer_cache, places)
            hidden_states = layer(hidden_states, mask, layer_cache)
        return hidden_states if places is None else at_places(hidden_states, places)

    def embed(self, tokens: mx.array) -> mx.array:
        """What enters the first layer: tokens (B, T) → hidden_states (B, T, D)."""
        raise NotImplementedError

    def head(self, hidden_states: mx.array) -> mx.array:
        """What follows the last layer: hidden_states (..., D) → logits (..., V)."""
        raise NotImplementedError

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last: `layer(x, mask, cache, places)`."""
        raise NotImplementedError

    @property
    def can_share_prompts(self) -> bool:
        """Whether every layer and its attention know a packed batch: those put in may not."""
        raise NotImplementedError

    def make_cache(self, capacity: int = 256) -> list[KVCache]:
        """A fresh KV cache a layer, with room for `capacity` positions before it grows."""
        return [KVCache(capacity) for _ in self.layers]


@functools.cache
def _takes_places(kind: type) -> bool:
    """Whether a layer can end at some places; one that somebody has put there may not."""
    for each in kind.__mro__:
        names = inspect.signature(each.__call__).parameters if "__call__" in vars(each) else {}
        if names and "kwargs" not in names:  # a checkpointed layer passes on what it gets
            return "places" in names
    return False


def _attention_mask(length: int, offset: int, padding: mx.array | None) -> mx.array | str | None:
    if padding is not None:
        return causal_mask(length, offset, padding)
    if length == 1:
        return None
    return "causal"
