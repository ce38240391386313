"""A Llama's dimensions, read from config.json and checked."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.errors import ConfigError
from workbench.models.rope import rope_periods

REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
LARGEST = {  # beyond reason, and beyond what a process survives
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 2**31 - 1,
    "rms_norm_eps": 1,
}
LARGEST_ROPE_THETA = 1e15


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
        missing = [key for key in REQUIRED if key not in config]
        if missing:
            raise ConfigError(
                f"missing {', '.join(missing)}",
                where="config.json",
                cure="Take the config.json that was published with these weights.",
            )
        for key in LARGEST:
            _check_positive(config, key)
        return cls(**_dimensions(config), **_rope(config), **_switches(config)).checked()

    def checked(self) -> LlamaConfig:
        """Self, if the dimensions fit together; raises ConfigError otherwise."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly",
                where="config.json: num_key_value_heads",
            )
        if self.num_attention_heads * self.head_dim > LARGEST["intermediate_size"]:
            raise ConfigError(
                f"{self.num_attention_heads} heads of {self.head_dim} features are beyond reason",
                where="config.json: head_dim",
            )
        if self.head_dim % 2:
            raise ConfigError("head_dim must be even, for RoPE's pairs", where="config.json")
        rope_periods(self.head_dim, self.rope_theta, self.rope_scaling)
        return self


def _check_positive(config: Mapping[str, object], key: str) -> None:
    value = config.get(key)
    if value is None and key not in REQUIRED:
        return
    wanted = float if key == "rms_norm_eps" else int
    is_number = isinstance(value, (int, wanted)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= LARGEST[key]:
        raise ConfigError(
            f"{key} must be a positive number up to {LARGEST[key]}, got {reprlib.repr(value)}",
            where="config.json",
        )


def _dimensions(config: Mapping[str, object]) -> dict[str, object]:
    heads = config["num_attention_heads"]
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise ConfigError(
            f"hidden_size {config['hidden_size']} cannot be shared by {heads} heads evenly",
            where="config.json: num_attention_heads",
        )
    return {
        **{key: config[key] for key in REQUIRED},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config.get("max_position_embeddings") or 2048,
    }


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    # transformers 5 writes rope_parameters; earlier releases rope_theta and rope_scaling.
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    if not isinstance(parameters, Mapping) or not isinstance(scaling, Mapping):
        raise ConfigError("must be an object", where="config.json: rope_scaling")
    theta = parameters.get("rope_theta", config.get("rope_theta", 10_000.0))
    if (
        isinstance(theta, bool)
        or not isinstance(theta, int | float)
        or not 1 < theta <= LARGEST_ROPE_THETA
    ):
        raise ConfigError(
            f"rope_theta must be a number above 1, got {reprlib.repr(theta)}", where="config.json"
        )
    return {
        "rope_theta": float(theta),
        "rope_scaling": dict(scaling) if scaling else None,
    }


def _switches(config: Mapping[str, object]) -> dict[str, object]:
    for key, only in (("hidden_act", "silu"), ("partial_rotary_factor", 1)):
        if config.get(key, only) not in (only, None):
            raise ConfigError(
                f"{key} {config[key]!r} is not supported; this Llama has {only!r}",
                where="config.json",
            )
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(config.get(key, False), bool):
            raise ConfigError(f"{key} must be true or false", where="config.json")
    return {
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "model_type": config.get("model_type", "llama"),
    }
