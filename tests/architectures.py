"""Many of mlx-lm's architectures, built tiny with random weights.

Each is a correct causal language model: a check that fails on one of them is wrong.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from tests.architecture_settings import (
    BAICHUAN,
    COMMON,
    DBRX,
    DELTA,
    EXAONE4,
    EXPERTS,
    FALCON,
    GEMMA4,
    GLM,
    GPT,
    GRIFFIN,
    JAMBA,
    LATENT,
    LAYER_TYPES,
    LFM2,
    LLAMA4,
    LONG,
    LONG_MOE,
    MINISTRAL_ROPE,
    MULTI_QUERY,
    NEMOTRON_H,
    OPENELM,
    ROUTED,
    RWKV,
    SCALED,
    SLIDING,
    STABLELM,
    STATE_SPACE,
    YARN,
)


@dataclass(frozen=True)
class Architecture:
    """A module of `mlx_lm.models`, the settings it is built with, and what is special about it."""

    name: str
    traits: frozenset[str]
    module: str  # in mlx_lm.models
    settings: Mapping[str, object] = field(hash=False)  # beside and over those of COMMON

    def build(self, seed: int = 0) -> nn.Module:
        """The model with random weights, evaluated."""
        library = importlib.import_module(f"mlx_lm.models.{self.module}")
        settings = {"model_type": self.module, **COMMON, **self.settings}
        # mlx-lm draws some biases and decays itself, from the global generator.
        mx.random.seed(seed)
        model = library.Model(library.ModelArgs.from_dict(settings))
        return randomise(model, seed)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size that keeps activations near 1, so that all logits differ.

    Matrices (…, out, in) become normal / sqrt(in). Norms, biases and decays keep the values they
    were made with, plus 0.1 × normal; single numbers, such as an epsilon, stay.
    """
    key, randomised = mx.random.key(seed), []
    for name, parameter in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        noise = mx.random.normal(parameter.shape, key=own)
        if parameter.ndim >= 2 and name.endswith("weight"):
            randomised.append((name, noise * parameter.shape[-1] ** -0.5))
        elif parameter.ndim:
            randomised.append((name, parameter + 0.1 * noise))
    model.update(tree_unflatten(randomised))
    mx.eval(model.parameters())
    return model


def _of(name: str, traits: str = "", module: str = "", **settings: object) -> Architecture:
    held = frozenset(trait for trait in traits.split(", ") if trait)
    return Architecture(name, held, module or name, settings)


DENSE = [
    _of("llama"),
    _of("llama, tied", "tied", "llama", tie_word_embeddings=True),
    _of("llama, interleaved rope", module="llama", rope_traditional=True),
    _of("llama, scaled rope", module="llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    _of("llama, one kv head", module="llama", num_key_value_heads=1),
    _of("qwen", "fused qkv", kv_channels=8),
    _of("qwen2", "tied", tie_word_embeddings=True),
    _of("qwen3"),
    _of("gemma", "tied"),
    _of("gemma2", "tied, softcap", query_pre_attn_scalar=8.0),
    _of("phi", "partial rope", partial_rotary_factor=0.5),
    _of("phi3", "fused qkv"),
    _of("olmo2"),
    _of("gpt2", "learned positions, fused qkv, tied", num_key_value_heads=None, **GPT),
    _of("gpt_bigcode", "learned positions, fused qkv, tied", n_inner=64, **MULTI_QUERY),
    _of("gpt_neox", "fused qkv, partial rope", rotary_emb_base=10_000, rotary_pct=0.5),
    _of("gptj", "partial rope", rotary_dim=4, **GPT),
    _of("cohere", "tied"),
    _of("starcoder2", "tied", tie_word_embeddings=True),
    _of("stablelm", "partial rope", use_qkv_bias=True, partial_rotary_factor=0.5),
    _of("stablelm, parallel", "partial rope", "stablelm", use_parallel_residual=True, **STABLELM),
    _of("nanochat", "softcap", num_key_value_heads=4),
    _of("granite", **SCALED),
    _of("minicpm", **SCALED),
    _of("minicpm3", "mla", rope_scaling=LONG, **SCALED, **LATENT),
    _of("internlm2", "fused qkv", bias=False),
    _of("internlm3", qkv_bias=True),
    _of("exaone", num_layers=2),
    _of("glm", "tied", tie_word_embeddings=True),
    _of("glm4", "partial rope", partial_rotary_factor=0.5),
    _of("helium"),
    _of("ernie4_5", use_bias=False),
    _of("nemotron", "partial rope", partial_rotary_factor=0.5, hidden_act="relu2"),
    _of("hunyuan_v1_dense"),
    _of("mimo"),
    _of("apertus", post_norm=False, qk_norm=True),
    _of("smollm3", "no rope layers, tied", no_rope_layer_interval=2, tie_word_embeddings=True),
    _of("openelm", "fused qkv, tied", **OPENELM),
    _of("talkie", num_key_value_heads=4),
    _of("plamo", n_shared_head=2),
    _of("youtu_llm", "mla, tied", tie_word_embeddings=True, **LATENT),
]
WINDOWED = [
    _of("mistral", "sliding window", "llama", **LAYER_TYPES),
    _of("ministral3", "sliding window", rope_parameters=MINISTRAL_ROPE, **LAYER_TYPES),
    _of("gemma3_text", "sliding window", query_pre_attn_scalar=8.0, **SLIDING),
    _of("gemma4_text", "sliding window, shared kv, softcap, tied", **GEMMA4),
    _of("cohere2", "sliding window, no rope layers, tied", **SLIDING),
    _of("olmo3", "sliding window", **LAYER_TYPES),
    _of("exaone4", "sliding window, no rope layers", rope_scaling=None, **EXAONE4),
    _of("gpt_oss", "sliding window, mixture of experts", **LAYER_TYPES, **EXPERTS),
    _of("baichuan_m1", "sliding window, recurrent, fused qkv", **BAICHUAN),
]
MIXTURES = [
    _of("mixtral", "mixture of experts", **EXPERTS),
    _of("qwen2_moe", "mixture of experts", **EXPERTS),
    _of("qwen3_moe", "mixture of experts", **EXPERTS),
    _of("olmoe", "mixture of experts", **EXPERTS),
    _of("granitemoe", "mixture of experts", **SCALED, **EXPERTS),
    _of("phimoe", "mixture of experts", rope_scaling=LONG_MOE, **EXPERTS),
    _of("dbrx", "mixture of experts, fused qkv", **DBRX),
    _of("deepseek", "mixture of experts", **ROUTED),
    _of("deepseek_v2", "mixture of experts, mla", rope_scaling=YARN, **ROUTED, **LATENT),
    _of("deepseek_v3", "mixture of experts, mla", **ROUTED, **LATENT),
    _of("glm4_moe", "mixture of experts, partial rope", use_qk_norm=True, **GLM, **ROUTED),
    _of("llama4_text", "no rope layers", **LLAMA4),
]
RECURRENT = [
    _of("mamba", "recurrent", **STATE_SPACE),
    _of("mamba2", "recurrent", num_heads=8, **STATE_SPACE),
    _of("recurrent_gemma", "recurrent, sliding window, softcap", **GRIFFIN),
    _of("rwkv7", "recurrent", **RWKV),
    _of("qwen3_next", "recurrent, mixture of experts, partial rope", **EXPERTS, **DELTA),
    _of("lfm2", "recurrent, tied", **LFM2),
    _of("jamba", "recurrent, no rope layers, mixture of experts", **EXPERTS, **JAMBA),
    _of("falcon_h1", "recurrent", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, **FALCON),
    _of("nemotron_h", "recurrent, no rope layers", **STATE_SPACE, **NEMOTRON_H),
]
ARCHITECTURES = {found.name: found for found in [*DENSE, *WINDOWED, *MIXTURES, *RECURRENT]}
