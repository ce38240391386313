"""Adapters in mlx-lm's layout: adapter_config.json and adapters.safetensors."""

from __future__ import annotations

import os
import reprlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import ConfigError, FileFormatError, WeightsError
from workbench.models.files import read_json, read_safetensors, write_json, write_safetensors
from workbench.models.loading import BaseModel
from workbench.models.report import compare
from workbench.models.structure import find_layers
from workbench.numerics import not_finite
from workbench.tuning.lora import (
    ALL_LINEAR,
    Adapter,
    LoRAConfig,
    add_lora,
    find_targets,
)
from workbench.tuning.lora_layers import LoRALinear, linear_dims

LARGEST_RANK = 1 << 16
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapters.safetensors"


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """Every array that belongs to the adapter, by name."""
    return {
        f"{path}.{name}": module[name]
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for name in module.parts
    }


def save_adapter(base: BaseModel, folder: str | os.PathLike) -> Path:
    """Write the attached adapter in mlx-lm's layout; `mlx_lm.generate --adapter-path` reads it.

    Returns:
        The folder.

    Raises:
        ConfigError: no adapter is attached, or one that mlx-lm's layout cannot describe.
        WeightsError: the adapter holds NaN or infinity.
        FileFormatError: the folder cannot be written.
    """
    folder, weights = Path(folder), adapter_weights(base.model)
    if not weights:
        raise ConfigError("no adapter is attached", cure="Attach one: wb.add_lora(base.model).")
    _require_finite(weights, "the adapter")
    description = _describe(base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as staging:
            write_safetensors(Path(staging, WEIGHTS_NAME), weights)
            write_json(Path(staging, CONFIG_NAME), description)
            # Killed between the two, this leaves a folder that does not load, never a mixture.
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            os.replace(Path(staging, WEIGHTS_NAME), folder / WEIGHTS_NAME)
            os.replace(Path(staging, CONFIG_NAME), folder / CONFIG_NAME)
    except OSError as error:
        raise FileFormatError(f"cannot be written ({error.strerror})", where=folder) from error
    return folder


def _describe(base: BaseModel) -> dict[str, object]:
    layers_path, num_layers = find_layers(base.model)
    adapted: dict[int, set[str]] = {}
    settings = set()
    for path, module in base.model.named_modules():
        if isinstance(module, LoRALinear):
            number, _, name = path.removeprefix(f"{layers_path}.").partition(".")
            adapted.setdefault(int(number), set()).add(name)
            settings.add((module.lora_a.shape[1], module.scale, module.dropout_rate))
    first, names = min(adapted), adapted[min(adapted)]
    is_tail = all(adapted.get(number) == names for number in range(first, num_layers))
    if len(settings) != 1 or not is_tail:
        raise ConfigError("mlx-lm's layout needs one kind of adapter on the last N layers alike")
    rank, scale, dropout = settings.pop()
    return {
        "fine_tune_type": "lora",
        "model": base.name,
        "num_layers": num_layers - first,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,  # mlx-lm's factor on the update: alpha / rank
            "dropout": dropout,
            "keys": sorted(names),
        },
    }


def load_adapter(base: BaseModel, folder: str | os.PathLike) -> Adapter:
    """Attach an adapter in mlx-lm's layout; one that is attached already is replaced.

    The file must hold all and only the tensors that the configuration implies; otherwise nothing
    of the model is changed.

    Raises:
        ConfigError: adapter_config.json does not describe a LoRA adapter for this model.
        WeightsError: a tensor is missing, unexpected, misshapen or not finite.
        FileFormatError: a file is absent or malformed.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder / CONFIG_NAME)
        expected = _expected_shapes(base.model, config)
    except ConfigError as error:
        where = error.where or folder / CONFIG_NAME
        raise ConfigError(error.what[:1000], where=where, cure=error.cure) from None
    weights = read_safetensors(folder / WEIGHTS_NAME)
    _require_finite(weights, folder / WEIGHTS_NAME)
    compare(expected, weights, source=str(folder / WEIGHTS_NAME)).require_complete()
    adapter = add_lora(base.model, config)
    base.model.load_weights(list(weights.items()), strict=False)
    mx.eval(base.model.trainable_parameters())
    return adapter


def _read_config(path: Path) -> LoRAConfig:
    config = read_json(path)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ConfigError(f"fine_tune_type {reprlib.repr(kind)} is not supported", where=path)
    parameters, num_layers = config.get("lora_parameters"), config.get("num_layers")
    if not isinstance(parameters, dict):
        raise ConfigError("needs an object 'lora_parameters'", where=path)
    numbers = {name: parameters.get(name) for name in ("rank", "scale", "dropout")}
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        got = reprlib.repr(num_layers)
        raise ConfigError(f"num_layers must be a whole number, got {got}", where=path)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            got = reprlib.repr(value)
            raise ConfigError(f"lora_parameters.{name} must be a number, got {got}", where=path)
    keys = ALL_LINEAR if parameters.get("keys") is None else parameters["keys"]
    if keys != ALL_LINEAR and not _is_list_of_names(keys):
        raise ConfigError("lora_parameters.keys must be a list of module names", where=path)
    if numbers["rank"] > LARGEST_RANK:
        raise ConfigError(f"lora_parameters.rank is beyond reason: {numbers['rank']}", where=path)
    return LoRAConfig(
        rank=numbers["rank"],
        alpha=numbers["scale"] * numbers["rank"],
        dropout=numbers["dropout"],
        target_modules=keys,
        num_layers=num_layers if num_layers > 0 else None,  # mlx-lm: 0 or less means all
    )


def _is_list_of_names(keys: object) -> bool:
    return isinstance(keys, list) and bool(keys) and all(isinstance(key, str) for key in keys)


def _expected_shapes(model: nn.Module, config: LoRAConfig) -> dict[str, mx.array]:
    modules, expected = dict(model.named_modules()), {}
    for path in find_targets(model, config):
        module = modules[path]
        linear = module.linear if isinstance(module, LoRALinear) else module
        in_dims, out_dims = linear_dims(linear)
        expected[f"{path}.lora_a"] = mx.zeros((in_dims, config.rank))
        expected[f"{path}.lora_b"] = mx.zeros((config.rank, out_dims))
    return expected


def _require_finite(weights: Mapping[str, mx.array], where: object) -> None:
    bad = not_finite(weights)
    if bad:
        raise WeightsError(f"{bad[0]} holds NaN or infinity", where=where)
