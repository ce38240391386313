"""How many floating-point operations the matrix products of a step take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.data.batches import Batch
from workbench.errors import ConfigError
from workbench.models.decoder import Decoder
from workbench.models.nanochat import NanoChat, NanoChatLayer
from workbench.models.shared_prompt import find_shared_prompt
from workbench.tuning.lora_layers import LoRALinear, linear_dims


def step_flops(
    model: nn.Module, batches: Sequence[Batch], first_layer: int = 0, shared: bool = False
) -> int:
    """Operations in the matrix products of forward and backward pass over micro-batches.

    A product (n, k) @ (k, m) takes 2 · n · k · m. The backward pass takes as much again for each
    of its two factors that needs a gradient: that trains, or depends on something that does.
    With B rows of T inputs, N = B · T, and S supervised targets, the products of the forward pass
    are

        linear layer                   2 · N · in · out
        its adapter                    2 · N · rank · (in + out)
        scores, and weighted values    2 · B · heads · T² · head_dim, each, for the whole square
        head                           2 · S · hidden_size · V

    In the last layer, those of the feed-forward layer are at the S positions only. Of rows that
    share their first P inputs, these are computed once: N = P + B · (T - P), and the squares are
    P² + B · (T - P) · T.

    A loss of one's own that takes the head elsewhere, too, needs more than is counted here. Layers
    that gradient checkpointing computes again are counted once: it is what the step needs that
    counts (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
        model: one of ours; its freeze flags say what trains.
        batches: the micro-batches of the step.
        first_layer: layers below it do not run; what enters it was kept.
        shared: what all rows of a batch begin with is computed once, where that is worth it.

    Raises:
        ConfigError: the model's products are not known.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(f"the products of a {type(model).__name__} are not known")
    counts = [_Products(batch, shared).of_step(model, first_layer) for batch in batches]
    return sum(counts)


class _Products:
    """Adds up the products of one micro-batch; `grows` is whether an input needs a gradient."""

    def __init__(self, batch: Batch, shared: bool):
        rows, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1
        prompt = find_shared_prompt(batch.tokens[:, :-1]) if shared else None
        common = prompt.length if prompt else 0
        self.positions = common + rows * (length - common)
        self.squares = common**2 + rows * (length - common) * length
        self.supervised, self.total = batch.num_tokens, 0

    def of_step(self, model: Decoder, first_layer: int) -> int:
        """All that a forward and a backward pass take."""
        embedding, norm, head = _outside_layers(model)
        grows = _trains(embedding) and not first_layer
        for layer in model.layers[first_layer:]:
            grows = self.of_layer(layer, grows, is_last=layer is model.layers[-1])
        grows = grows or _trains(norm)
        width = model.config.hidden_size
        vocab = model.head(mx.zeros((1, width))).shape[-1]  # not evaluated
        self.add(2 * self.supervised * width * vocab, grows, _trains(head))
        return self.total

    def of_layer(self, layer: nn.Module, grows: bool, is_last: bool) -> bool:
        """A decoder layer; returns whether its output needs a gradient."""
        parts, here = _parts(layer), self.positions
        inputs = grows or _trains(parts.norm)
        queries, keys, values = (self.linear(each, inputs, here) for each in parts.projections)
        squares = 2 * self.squares * linear_dims(_plain(parts.projections[0]))[1]
        self.add(squares, queries, keys)
        self.add(squares, queries or keys, values)
        grows = self.linear(parts.output, queries or keys or values, here) or grows
        here = self.supervised if is_last else here
        inputs = grows or _trains(parts.second_norm)
        inner = [self.linear(each, inputs, here) for each in parts.inner]
        return self.linear(parts.outer, any(inner), here) or grows

    def linear(self, module: nn.Module, grows: bool, positions: int) -> bool:
        """A linear layer at so many positions; returns whether its output needs a gradient."""
        if isinstance(module, LoRALinear):
            output = self.linear(module.linear, grows, positions)
            a, b = (name in module.trainable_parameters() for name in ("lora_a", "lora_b"))
            self.add(2 * positions * module.lora_a.size, grows, a)
            self.add(2 * positions * module.lora_b.size, grows or a, b)
            return output or grows or a or b
        if not isinstance(module, nn.Linear | nn.QuantizedLinear):
            raise ConfigError(f"the products of a {type(module).__name__} are not known")
        in_dims, out_dims = linear_dims(module)
        trained = module.trainable_parameters()
        self.add(2 * positions * in_dims * out_dims, grows, "weight" in trained)
        return grows or bool(trained)

    def add(self, flops: int, *factors_grow: bool) -> None:
        """One product, and the gradients of those of its factors that need one."""
        self.total += flops * (1 + sum(map(bool, factors_grow)))


class _Parts(NamedTuple):
    """The modules of a decoder layer in the order of their use; None for a norm without weights."""

    norm: nn.Module | None
    projections: tuple[nn.Module, ...]  # queries, keys, values: (…, heads · head_dim)
    output: nn.Module
    second_norm: nn.Module | None
    inner: tuple[nn.Module, ...]
    outer: nn.Module


def _parts(layer: nn.Module) -> _Parts:
    if isinstance(layer, NanoChatLayer):
        attn, mlp = layer.attn, layer.mlp
        projections = attn.c_q, attn.c_k, attn.c_v
        return _Parts(None, projections, attn.c_proj, None, (mlp.c_fc,), mlp.c_proj)
    attn, mlp = layer.self_attn, layer.mlp
    projections, inner = (attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return _Parts(norms[0], projections, attn.o_proj, norms[1], inner, mlp.down_proj)


def _outside_layers(model: Decoder) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    """Embedding, final norm and head."""
    if isinstance(model, NanoChat):
        return model.transformer.wte, None, model.lm_head
    embedding = model.model.embed_tokens
    return embedding, model.model.norm, model.get("lm_head", embedding)


def _trains(module: nn.Module | None) -> bool:
    return module is not None and bool(tree_flatten(module.trainable_parameters()))


def _plain(module: nn.Module) -> nn.Module:
    return module.linear if isinstance(module, LoRALinear) else module
