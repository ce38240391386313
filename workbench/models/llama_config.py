"""A Llama's dimensions, read from config.json and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workbench.errors import ConfigError
from workbench.models.config_checks import (
    check_head_dim,
    check_heads,
    check_numbers,
    check_only,
    read_rope,
)

REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
WHERE = "config.json"
ONLY = {"hidden_act": "silu", "partial_rotary_factor": 1}


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama's dimensions, under Hugging Face's names."""

    hidden_size: int  # features of a token's hidden state
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # features inside the feed-forward layer
    vocab_size: int  # rows of the embedding
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # tokens
    rope_scaling: Mapping[str, object] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> LlamaConfig:
        """Read a Hugging Face config.json.

        Raises:
            ConfigError: a needed key is missing, or a number is impossible.
        """
        check_numbers(config, REQUIRED, WHERE)
        made = cls(**_dimensions(config), **read_rope(config, WHERE), **_switches(config))
        check_heads(made, WHERE)
        return made


def _dimensions(config: Mapping[str, object]) -> dict[str, object]:
    heads = config["num_attention_heads"]
    return {
        **{key: config[key] for key in REQUIRED},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or check_head_dim(config["hidden_size"], heads, WHERE),
        "max_position_embeddings": config.get("max_position_embeddings") or 2048,
    }


def _switches(config: Mapping[str, object]) -> dict[str, object]:
    check_only(config, ONLY, "this Llama", WHERE)
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(config.get(key, False), bool):
            raise ConfigError(f"{key} must be true or false", where=WHERE)
    return {
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "model_type": config.get("model_type", "llama"),
    }
