"""Llama: a backbone (embedding and layers) and a head (final norm and lm_head).

Parameters carry Hugging Face's names, so checkpoints and adapters fit without renaming.
Right for Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM2, and Mistral without a sliding window
(Touvron et al. 2023, Llama 2, section 2; Jiang et al. 2023, Mistral 7B).
"""

from __future__ import annotations

import functools
import inspect

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.models.layers import Attention, HeadLinear, KVCache, SwiGLU, at_places, causal_mask
from workbench.models.llama_config import LlamaConfig
from workbench.models.shared_prompt import SharedPrompt


class DecoderLayer(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | SharedPrompt | None,
        cache: KVCache | None = None,
        places: mx.array | None = None,
    ) -> mx.array:
        """x (B, T, hidden_size) → the same shape, or (N, hidden_size) of N places in B · T."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        x = x if places is None else at_places(x, places)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Holds what a checkpoint calls `model.*`: embedding, layers and the final norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        for layer in self.layers:  # one object, so that a token's rotation is made once
            layer.self_attn.rope = self.layers[0].self_attn.rope
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Llama(nn.Module):
    """logits = head(backbone(tokens))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = HeadLinear(config.hidden_size, config.vocab_size, bias=False)

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

    def embed(self, tokens: mx.array) -> mx.array:
        """What enters the first layer: tokens (B, T) → hidden_states (B, T, D)."""
        return self.model.embed_tokens(tokens)

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

    def head(self, hidden_states: mx.array) -> mx.array:
        """Final norm and lm_head: hidden_states (..., D) → logits (..., V)."""
        hidden_states = self.model.norm(hidden_states)
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden_states)
        return self.lm_head(hidden_states)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, first to last."""
        return self.model.layers

    @property
    def can_share_prompts(self) -> bool:
        """Whether every layer and its attention know a packed batch: those put in may not."""
        return all(
            type(layer).__call__ is DecoderLayer.__call__
            and type(layer.self_attn).__call__ is Attention.__call__
            for layer in self.layers
        )

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
