"""config.json and generation_config.json of an exported model, complete for other tools."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import mlx.core as mx

from workbench.models.files import read_json
from workbench.models.llama import Llama
from workbench.models.llama_config import LlamaConfig
from workbench.models.loading import BaseModel
from workbench.models.nanochat import NanoChat
from workbench.models.rope import rope_kind

GENERATION_NAME = "generation_config.json"
NOT_OURS = {  # of the base's config.json: they say of its files what is not so of ours
    "_name_or_path",
    "auto_map",  # code beside the base's weights, which nobody copies
    "dtype",
    "quantization",
    "quantization_config",
    "torch_dtype",
}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_config(
    base: BaseModel, weights: Mapping[str, mx.array], quantization: Mapping[str, object] | None
) -> dict[str, object]:
    """What config.json says of the exported weights.

    For a network of ours it says every dimension; for a Llama, in the words that transformers and
    mlx-lm have in common: mlx-lm reads rope_theta and rope_scaling, not the rope_parameters of
    transformers 5, and the two have different defaults for tie_word_embeddings.
    """
    config = {key: value for key, value in base.raw_config.items() if key not in NOT_OURS}
    if isinstance(base.model, Llama):
        config.pop("rope_parameters", None)
        config |= _llama(base.config)
        config.setdefault("architectures", [CLASSES[base.config.model_type]])
        config.setdefault("hidden_act", "silu")
    elif isinstance(base.model, NanoChat):
        config |= dataclasses.asdict(base.config)
    config["dtype"] = _main_dtype(weights)
    config |= {name: number for name, number in _tokens(base).items() if number is not None}
    if quantization is not None:
        # mlx-lm reads the first, and writes both.
        config |= {"quantization": quantization, "quantization_config": quantization}
    return dict(sorted(config.items()))


def _llama(config: LlamaConfig) -> dict[str, object]:
    scaling = dict(config.rope_scaling or {})
    kind = rope_kind(scaling)
    scaling.pop("rope_theta", None)
    return {
        **dataclasses.asdict(config),
        "rope_scaling": None if kind == "default" else scaling,
    }


def _main_dtype(weights: Mapping[str, mx.array]) -> str:
    """The dtype of most floating-point numbers."""
    sizes: dict[str, int] = {}
    for array in weights.values():
        if mx.issubdtype(array.dtype, mx.floating):
            name = str(array.dtype).removeprefix("mlx.core.")
            sizes[name] = sizes.get(name, 0) + array.size
    return max(sizes, key=sizes.get)


def _tokens(base: BaseModel) -> dict[str, object]:
    ids = {name: getattr(base.tokenizer, name, None) for name in TOKENS}
    known = {name: base.raw_config.get(name) for name in TOKENS}
    return {name: ids[name] if known[name] is None else known[name] for name in TOKENS}


def generation_config(base: BaseModel) -> dict[str, object]:
    """The base model's own where it has one, else its special tokens.

    Raises:
        FileFormatError: the base's is malformed.
    """
    path = base.path / GENERATION_NAME
    if base.path.is_dir() and os.path.lexists(path):
        return read_json(path)
    return {name: number for name, number in _tokens(base).items() if number is not None}
