"""A model folder's config.json, checked as far as every architecture allows."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from workbench.errors import ConfigError, SourceError
from workbench.models.files import read_json
from workbench.models.quantisation import check_quantisation

LIMITS = {  # names of counts that are built one by one in Python: the most that makes sense
    re.compile(r"n_layers?|num_(hidden_|decoder_|encoder_)?layers"): 1024,
    re.compile(r"n_heads?|(num|n)_\w*(heads|experts)"): 65_536,
}
MAX_WORD = 100  # characters of a name
FOREIGN_QUANTISATION = "hf_quant_config.json"  # mlx-lm reads it


def read_config(folder: Path) -> dict[str, object]:
    """config.json, with the end tokens of generation_config.json where it has them.

    Raises:
        SourceError: the folder has no config.json.
        FileFormatError: a file is not a whole JSON object.
        ConfigError: no model_type, a count beyond all reason, end tokens that are no ids, or a
            quantisation that MLX does not have.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise SourceError(
            "holds no config.json",
            where=folder,
            cure="Give a model folder: config.json, model*.safetensors, and the tokenizer's files.",
        )
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or len(kind) > MAX_WORD:
        raise ConfigError("missing model_type", where=path)
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        ids = read_json(generation).get("eos_token_id")
        config = {**config, "eos_token_id": ids if ids is not None else config.get("eos_token_id")}
    if os.path.lexists(folder / FOREIGN_QUANTISATION):
        read_json(folder / FOREIGN_QUANTISATION)
    check_end_tokens(config, path)
    for key, value in _settings(config):
        for pattern, limit in LIMITS.items():
            if pattern.fullmatch(key) and isinstance(value, int | float) and not value <= limit:
                raise ConfigError(f"{key} {reprlib.repr(value)} is beyond reason", where=path)
    if config.get("quantization") is not None:
        check_quantisation(config["quantization"], path)
    return config


def _settings(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _settings(value)


def check_end_tokens(config: Mapping[str, object], where: object) -> None:
    """Raise ConfigError unless eos_token_id is an id, a list of ids, or absent."""
    ids = config.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(number) is int and 0 <= number < 2**31 for number in listed):
        raise ConfigError("eos_token_id must be a token id or a list of them", where=where)
