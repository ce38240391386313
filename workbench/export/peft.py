"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT keeps lora_A (rank, in) and lora_B (out, rank), as torch's linear layers do; ours are their
transposes. Its scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; DoRA's lengths
are the `lora_magnitude_vector` (out,).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import AdapterWarning, ConfigError
from workbench.export.attached import (
    CONFIG_NAME,
    Attached,
    adapter_weights,
    attach,
    expected_arrays,
    modules_of,
    naming,
    require_fit,
    write_pair,
)
from workbench.export.base_sketch import require_base, sketch
from workbench.export.peft_config import check_config, is_pattern, read_config
from workbench.models.files import read_json, read_safetensors, weight_files
from workbench.models.llama import Llama
from workbench.models.loading import BaseModel
from workbench.models.safetensors_header import read_header, read_metadata
from workbench.models.sources import hub_name
from workbench.models.structure import find_layers
from workbench.tuning.lora import Adapter
from workbench.tuning.lora_layers import LoRALinear, linear_dims

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def write(base: BaseModel, attached: Attached, folder: Path) -> None:
    """Write the attached adapter; `peft.PeftModel.from_pretrained` reads it.

    Raises:
        ConfigError: the network's layers are not named as in transformers, or PEFT would adapt
            more of them.
        FileFormatError: the folder cannot be written.
    """
    if not isinstance(base.model, Llama):  # it is named and laid out as in its files
        _require_their_names(base, attached)
    ours = adapter_weights(base.model)
    weights = {_their_name(name): _transposed(array) for name, array in ours.items()}
    # Its own default of "pt" is what PEFT and transformers look for.
    about = {"format": "pt", **sketch(base.model, modules_of(ours))}
    write_pair(folder, _config(base, attached), WEIGHTS_NAME, weights, about)


def _config(base: BaseModel, attached: Attached) -> dict[str, object]:
    alpha = attached.scale * attached.rank
    all_layers = attached.num_layers == attached.total
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_name(base.name),
        "revision": None,
        "inference_mode": True,
        "r": attached.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": attached.dropout,
        "use_rslora": False,  # one scale says all: alpha / r
        "use_dora": attached.use_dora,
        "target_modules": _short_names(base.model, attached),
        "layers_to_transform": None if all_layers else [*range(attached.first, attached.total)],
        "layers_pattern": None if all_layers else find_layers(base.model)[0].rpartition(".")[2],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _short_names(model: nn.Module, attached: Attached) -> list[str]:
    """`q_proj` for `self_attn.q_proj`, as people write it, where nothing else is called so."""
    last = {name.rpartition(".")[2] for name in attached.names}
    # An adapted layer stands for the plain one inside it.
    paths = [path.removesuffix(".linear") for path, _ in model.named_modules()]
    alike = {path for path in paths if path.rpartition(".")[2] in last}
    same = all(path.endswith(tuple(f".{name}" for name in attached.names)) for path in alike)
    return sorted(last) if same else list(attached.names)


def _their_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{PREFIX}{path}.{LEAVES[leaf]}"


def _transposed(array: mx.array) -> mx.array:
    return array.T if array.ndim == 2 else array


def _require_their_names(base: BaseModel, attached: Attached) -> None:
    """Raise ConfigError unless PEFT finds the adapted layers, and no more, by the files' names.

    An architecture of mlx-lm may rename, split or transpose what it reads.
    """
    shapes = {}
    if base.path.is_dir():
        for path in weight_files(base.path):
            shapes.update({name: entry.shape for name, entry in read_header(path).items()})
    adapted = {p: m for p, m in base.model.named_modules() if isinstance(m, LoRALinear)}
    for path, module in adapted.items():
        in_dims, out_dims = linear_dims(module.linear)
        found = shapes.get(f"{path}.weight")
        packed = f"{path}.scales" in shapes and found is not None and found[0] == out_dims
        if found != (out_dims, in_dims) and not packed:
            raise ConfigError(
                f"{path} is not named or laid out so in the model's own files, which PEFT uses",
                cure="Save the adapter with format='mlx-lm'.",
            )
    ends = tuple(f".{name}.weight" for name in _short_names(base.model, attached))
    layers, numbers = find_layers(base.model)[0], range(attached.first, attached.total)
    inside = tuple(f"{layers}.{number}." for number in numbers)
    for name in shapes:
        path = name.removesuffix(".weight")
        if name.startswith(inside) and name.endswith(ends) and path not in adapted:
            raise ConfigError(
                f"PEFT would adapt {path} of the model's own files, too",
                cure="Save the adapter with format='mlx-lm'.",
            )


def load(base: BaseModel, folder: Path, any_base: bool = False) -> Adapter:
    """Attach a LoRA, rsLoRA or DoRA adapter that PEFT, or `write`, made.

    Raises:
        ConfigError: adapter_config.json needs something that cannot be represented here.
        WeightsError: a tensor is missing, unexpected, misshapen or not finite, or the adapter was
            made on another base.
        FileFormatError: a file is absent or malformed.

    Warns:
        AdapterWarning: target_modules is a regular expression; or see `require_base`.
    """
    path, file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    with naming(path):
        content = read_json(path)
        check_config(content)
        weights = read_safetensors(file)
        config = read_config(content, base.model, _named_modules(weights))
        expected = expected_arrays(base.model, config)
    theirs = {_their_name(name): _transposed(array) for name, array in expected.items()}
    require_fit(theirs, weights, file)
    named, about = content.get("base_model_name_or_path"), read_metadata(file)
    require_base(base, modules_of(expected), about, named, file, any_base)
    _warn_of_a_pattern(content, path)
    found = {name: _transposed(weights[_their_name(name)]) for name in expected}
    # PEFT, too, computes an adapter of 16-bit numbers in float32.
    return attach(base.model, config, {n: w.astype(mx.float32) for n, w in found.items()})


def _named_modules(weights: Iterable[str]) -> set[str]:
    """Paths of the modules that have a tensor of LoRA's in the file."""
    ends = tuple(f".{leaf}" for leaf in LEAVES.values())
    return {
        name.removeprefix(PREFIX).removesuffix(end)
        for name in weights
        for end in ends
        if name.startswith(PREFIX) and name.endswith(end)
    }


def _warn_of_a_pattern(content: Mapping[str, object], path: Path) -> None:
    if is_pattern(content.get("target_modules")):
        warnings.warn(
            f"{path}: target_modules is a regular expression, which is not run: adapted are the "
            f"modules that {WEIGHTS_NAME} names.",
            AdapterWarning,
            stacklevel=3,
        )
