"""Llama: a backbone (embedding and layers) and a head (final norm and lm_head).

Parameters carry Hugging Face's names, so checkpoints and adapters fit without renaming.
Right for Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM2, and Mistral without a sliding window
(Touvron et al. 2023, Llama 2, section 2; Jiang et al. 2023, Mistral 7B).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from workbench.models.decoder import Decoder
from workbench.models.layers import Attention, HeadLinear, KVCache, SwiGLU, at_places
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


class Llama(Decoder):
    """logits = head(backbone(tokens))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = HeadLinear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: mx.array) -> mx.array:
        """What enters the first layer: tokens (B, T) → hidden_states (B, T, D)."""
        return self.model.embed_tokens(tokens)

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
