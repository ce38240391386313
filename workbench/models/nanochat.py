"""nanochat's GPT: no biases, norms without weights, ReLU², a head of its own, capped logits.

Karpathy 2025, nanochat, gpt.py. Parameters carry the names of mlx-lm's nanochat, so that a
checkpoint serves both.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import DataError
from workbench.models.decoder import Decoder
from workbench.models.layers import HeadLinear, KVCache, RotaryAttention, at_places
from workbench.models.nanochat_config import LOGIT_SOFTCAP, NanoChatConfig
from workbench.models.rope import RotaryEmbedding
from workbench.models.shared_prompt import SharedPrompt

NORM_EPSILON = 1e-5  # as mlx-lm's
ROWS_OF_IDS = "Give rows of ids, all of one length: mx.array([[5, 3, 8]])."
HEAD_STD = 0.001  # of the head's first weights: every first logit is near 0


def norm(x: mx.array) -> mx.array:
    """x / sqrt(mean(x²) + epsilon), over the last axis: RMSNorm without a weight.

    Zhang and Sennrich 2019, Root Mean Square Layer Normalization.
    """
    return mx.fast.rms_norm(x, None, NORM_EPSILON)


def softcap(logits: mx.array) -> mx.array:
    """15 · tanh(logits / 15) in float32 (Gemma Team 2024, Gemma 2, section 2)."""
    return LOGIT_SOFTCAP * mx.tanh(logits.astype(mx.float32) / LOGIT_SOFTCAP)


class NanoChatAttention(RotaryAttention):
    """Grouped-query attention whose queries and keys are normalised after they are rotated."""

    def __init__(self, config: NanoChatConfig):
        rope = RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            config.max_position_embeddings,
            scaling=None,
            backwards=True,
        )
        super().__init__(config, rope)
        dim, keys = config.hidden_size, self.num_kv_heads * config.head_dim
        self.c_q = nn.Linear(dim, dim, bias=False)
        self.c_k = nn.Linear(dim, keys, bias=False)
        self.c_v = nn.Linear(dim, keys, bias=False)
        self.c_proj = nn.Linear(dim, dim, bias=False)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | SharedPrompt | None,
        cache: KVCache | None = None,
    ) -> mx.array:
        """x (B, T, hidden_size) → the same shape."""
        projected = self.c_q(x), self.c_k(x), self.c_v(x)
        return self.c_proj(self.attended(mask, cache, *projected))

    def _in_heads(
        self, queries: mx.array, keys: mx.array, values: mx.array, offset: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        queries, keys, values = super()._in_heads(queries, keys, values, offset)
        return norm(queries), norm(keys), values


class ReLUSquared(nn.Module):
    """The feed-forward layer: c_proj(relu(c_fc(x))²) (So et al. 2021, Primer, section 4)."""

    def __init__(self, config: NanoChatConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., hidden_size) → the same shape."""
        return self.c_proj(mx.square(nn.relu(self.c_fc(x))))


class NanoChatLayer(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NanoChatConfig):
        super().__init__()
        self.attn = NanoChatAttention(config)
        self.mlp = ReLUSquared(config)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | SharedPrompt | None,
        cache: KVCache | None = None,
        places: mx.array | None = None,
    ) -> mx.array:
        """x (B, T, hidden_size) → the same shape, or (N, hidden_size) of N places in B · T."""
        x = x + self.attn(norm(x), mask, cache)
        x = x if places is None else at_places(x, places)
        return x + self.mlp(norm(x))


class NanoChatTransformer(nn.Module):
    """Holds what a checkpoint calls `transformer.*`: the embedding and the layers."""

    def __init__(self, config: NanoChatConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = [NanoChatLayer(config) for _ in range(config.num_hidden_layers)]
        for layer in self.h:  # one object, so that a token's rotation is made once
            layer.attn.rope = self.h[0].attn.rope


class NanoChat(Decoder):
    """logits = softcap(lm_head(norm(layers(norm(embedding(tokens))))))."""

    def __init__(self, config: NanoChatConfig):
        super().__init__()
        self.config = config
        self.transformer = NanoChatTransformer(config)
        self.lm_head = HeadLinear(config.hidden_size, config.vocab_size, bias=False)
        self._start()

    def __call__(
        self,
        tokens: mx.array,
        targets: mx.array | None = None,
        *,
        cache: list[KVCache] | None = None,
        padding: mx.array | None = None,
    ) -> mx.array:
        """Logits, or the loss where targets are given.

        Args:
            tokens: (B, T) ids.
            targets: (B, T) ids, aligned already: targets[:, t] is the token that is to follow
                tokens[:, t]. A negative one is ignored; one that the vocabulary does not have
                makes the loss NaN.
            cache, padding: as for `backbone`.

        Returns:
            (B, T, V) float32, within ± 15; with targets, the mean cross-entropy over those that
            count, in nats, a scalar: 0 if none does.

        Raises:
            DataError: tokens or targets are no ids (B, T), or differ in shape.
        """
        _require_ids("tokens", tokens, ROWS_OF_IDS)
        if tokens.ndim != 2 or not tokens.size:
            raise DataError(f"tokens must be (B, T) from 1, got {tokens.shape}", cure=ROWS_OF_IDS)
        if targets is None:
            return super().__call__(tokens, cache, padding)
        _require_ids("targets", targets, "A cache is given by its name: model(tokens, cache=…).")
        if targets.shape != tokens.shape:
            raise DataError(
                f"targets {targets.shape} misaligned with tokens {tokens.shape}",
                cure="Give the token that follows each: ids[:, :-1] and ids[:, 1:].",
            )
        return _mean_loss(super().__call__(tokens, cache, padding), targets)

    def embed(self, tokens: mx.array) -> mx.array:
        """What enters the first layer: tokens (B, T) → hidden_states (B, T, D), normalised."""
        return norm(self.transformer.wte(tokens))

    def head(self, hidden_states: mx.array) -> mx.array:
        """Final norm, lm_head and softcap: hidden_states (..., D) → logits (..., V), float32."""
        return softcap(self.lm_head(norm(hidden_states)))

    @property
    def layers(self) -> list[NanoChatLayer]:
        """The decoder layers, first to last."""
        return self.transformer.h

    @property
    def can_share_prompts(self) -> bool:
        """Whether every layer and its attention know a packed batch: those put in may not."""
        return all(
            type(layer).__call__ is NanoChatLayer.__call__
            and type(layer.attn).__call__ is NanoChatAttention.__call__
            for layer in self.layers
        )

    def _start(self) -> None:
        """nanochat's first weights, drawn from `mx.random`.

        Every layer starts as the identity: what leads back into the residual stream is zero.
        """
        config = self.config
        bound = (3 / config.hidden_size) ** 0.5  # uniform, with a deviation of 1 / sqrt(D)
        for layer in self.layers:
            attn, mlp = layer.attn, layer.mlp
            for module in (attn.c_q, attn.c_k, attn.c_v, mlp.c_fc):
                module.weight = mx.random.uniform(-bound, bound, module.weight.shape)
            for module in (attn.c_proj, mlp.c_proj):
                module.weight = mx.zeros(module.weight.shape)
        shape = (config.vocab_size, config.hidden_size)
        self.transformer.wte.weight = mx.random.normal(shape)
        self.lm_head.weight = mx.random.normal(shape, scale=HEAD_STD)


def _require_ids(name: str, ids: object, cure: str) -> None:
    """Raise DataError unless these are an array of whole numbers."""
    if not isinstance(ids, mx.array):
        raise DataError(f"{name} must be an array of ids, got a {type(ids).__name__}", cure=cure)
    if not mx.issubdtype(ids.dtype, mx.integer):
        raise DataError(f"{name} must be whole numbers, got {ids.dtype}", cure=cure)


def _mean_loss(logits: mx.array, targets: mx.array) -> mx.array:
    counts, known = targets >= 0, targets < logits.shape[-1]
    # MLX would read beyond the logits.
    losses = nn.losses.cross_entropy(logits, mx.where(counts & known, targets, 0))  # (B, T)
    losses = mx.where(counts, mx.where(known, losses, mx.nan), 0)
    return losses.sum() / mx.maximum(counts.sum(), 1)
