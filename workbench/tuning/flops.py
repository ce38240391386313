"""How many floating-point operations the matrix products of a step take."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.data.batches import Batch
from workbench.errors import ConfigError
from workbench.models.llama import DecoderLayer, Llama
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
    if not isinstance(model, Llama):
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

    def of_step(self, model: Llama, first_layer: int) -> int:
        """All that a forward and a backward pass take."""
        grows = _trains(model.model.embed_tokens) and not first_layer
        for layer in model.layers[first_layer:]:
            grows = self.of_layer(layer, grows, is_last=layer is model.layers[-1])
        grows = grows or _trains(model.model.norm)
        tied = model.config.tie_word_embeddings
        weight_trains = _trains(model.model.embed_tokens if tied else model.lm_head)
        width = model.config.hidden_size
        vocab = model.head(mx.zeros((1, width))).shape[-1]  # not evaluated
        self.add(2 * self.supervised * width * vocab, grows, weight_trains)
        return self.total

    def of_layer(self, layer: DecoderLayer, grows: bool, is_last: bool) -> bool:
        """A decoder layer; returns whether its output needs a gradient."""
        attention, mlp, here = layer.self_attn, layer.mlp, self.positions
        inputs = grows or _trains(layer.input_layernorm)
        queries = self.linear(attention.q_proj, inputs, here)
        keys = self.linear(attention.k_proj, inputs, here)
        values = self.linear(attention.v_proj, inputs, here)
        head_dim = linear_dims(_plain(attention.q_proj))[1] // attention.num_heads
        squares = 2 * attention.num_heads * self.squares * head_dim
        self.add(squares, queries, keys)
        self.add(squares, queries or keys, values)
        grows = self.linear(attention.o_proj, queries or keys or values, here) or grows
        here = self.supervised if is_last else here
        inputs = grows or _trains(layer.post_attention_layernorm)
        gate, up = self.linear(mlp.gate_proj, inputs, here), self.linear(mlp.up_proj, inputs, here)
        return self.linear(mlp.down_proj, gate or up, here) or grows

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


def _trains(module: nn.Module) -> bool:
    return bool(tree_flatten(module.trainable_parameters()))


def _plain(module: nn.Module) -> nn.Module:
    return module.linear if isinstance(module, LoRALinear) else module
