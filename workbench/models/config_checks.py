"""What is checked of any config.json before a network of ours is built from it."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping

from workbench.errors import ConfigError
from workbench.models.rope import rope_periods

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


def check_numbers(config: Mapping[str, object], required: Collection[str], where: str) -> None:
    """Raise ConfigError unless the required numbers are there, and every known one is possible.

    A key of LARGEST that is not required may be absent, or None.
    """
    missing = [key for key in required if key not in config]
    if missing:
        raise ConfigError(
            f"missing {', '.join(missing)}",
            where=where,
            cure="Take the config.json that was published with these weights.",
        )
    for key in LARGEST:
        if config.get(key) is not None or key in required:
            _check_positive(key, config.get(key), where)


def _check_positive(key: str, value: object, where: str) -> None:
    wanted = float if key == "rms_norm_eps" else int
    is_number = isinstance(value, (int, wanted)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= LARGEST[key]:
        raise ConfigError(
            f"{key} must be a positive number up to {LARGEST[key]}, got {reprlib.repr(value)}",
            where=where,
        )


def check_theta(theta: object, where: str) -> float:
    """RoPE's base as a float; raises ConfigError unless it is a number above 1, within reason."""
    is_number = isinstance(theta, int | float) and not isinstance(theta, bool)
    if not is_number or not 1 < theta <= LARGEST_ROPE_THETA:
        raise ConfigError(
            f"rope_theta must be a number above 1, got {reprlib.repr(theta)}", where=where
        )
    return float(theta)


def read_rope(config: Mapping[str, object], where: str) -> dict[str, object]:
    """RoPE's `rope_theta`, and its `rope_scaling` or None."""
    # transformers 5 writes rope_parameters; earlier releases rope_theta and rope_scaling.
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    if not isinstance(parameters, Mapping) or not isinstance(scaling, Mapping):
        raise ConfigError("must be an object", where=f"{where}: rope_scaling")
    theta = parameters.get("rope_theta", config.get("rope_theta", 10_000.0))
    scaling = dict(scaling) if scaling else None
    return {"rope_theta": check_theta(theta, where), "rope_scaling": scaling}


def check_head_dim(hidden_size: int, num_heads: int, where: str) -> int:
    """Features of a head that shares hidden_size; raises ConfigError unless a whole number."""
    if hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size {hidden_size} cannot be shared by {num_heads} heads evenly",
            where=f"{where}: num_attention_heads",
        )
    return hidden_size // num_heads


def check_heads(config: object, where: str) -> None:
    """Raise ConfigError unless heads, their features and RoPE fit together.

    Args:
        config: with num_attention_heads, num_key_value_heads, head_dim, rope_theta, and perhaps
            rope_scaling.
        where: for the message.
    """
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"{config.num_attention_heads} query heads cannot share "
            f"{config.num_key_value_heads} key/value heads evenly",
            where=f"{where}: num_key_value_heads",
        )
    if config.num_attention_heads * config.head_dim > LARGEST["intermediate_size"]:
        raise ConfigError(
            f"{config.num_attention_heads} heads of {config.head_dim} features are beyond reason",
            where=f"{where}: head_dim",
        )
    if config.head_dim % 2:
        raise ConfigError("head_dim must be even, for RoPE's pairs", where=where)
    rope_periods(config.head_dim, config.rope_theta, getattr(config, "rope_scaling", None))


def check_only(
    config: Mapping[str, object], only: Mapping[str, object], network: str, where: str
) -> None:
    """Raise ConfigError for a setting that is there, and not what the network has in its code."""
    for key, value in only.items():
        if config.get(key, value) not in (value, None):
            raise ConfigError(
                f"{key} {reprlib.repr(config[key])} is not supported; {network} has {value!r}",
                where=where,
            )
