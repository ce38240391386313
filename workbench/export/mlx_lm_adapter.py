"""Adapters in mlx-lm's layout: adapter_config.json and adapters.safetensors."""

from __future__ import annotations

import reprlib
from pathlib import Path

from workbench.errors import ConfigError
from workbench.export.attached import (
    CONFIG_NAME,
    Attached,
    adapter_weights,
    attach,
    expected_arrays,
    modules_of,
    naming,
    require_fit,
    require_no_experts,
    write_pair,
)
from workbench.export.base_sketch import require_base, sketch
from workbench.models.files import read_json, read_safetensors
from workbench.models.loading import BaseModel
from workbench.models.safetensors_header import read_metadata
from workbench.models.sources import hub_name
from workbench.tuning.lora import ALL_LINEAR, LARGEST_RANK, Adapter, LoRAConfig

WEIGHTS_NAME = "adapters.safetensors"


def write(base: BaseModel, attached: Attached, folder: Path) -> None:
    """Write the attached adapter; `mlx_lm.generate --adapter-path` and `mlx_lm.fuse` read it."""
    config = {
        "fine_tune_type": "dora" if attached.use_dora else "lora",
        "model": hub_name(base.name),  # for a reader: mlx-lm takes its own --model
        "num_layers": attached.num_layers,
        "lora_parameters": {
            "rank": attached.rank,
            "scale": attached.scale,  # mlx-lm's factor on the update; rsLoRA is another scale
            "dropout": attached.dropout,
            "keys": list(attached.names),
        },
    }
    weights = adapter_weights(base.model)
    write_pair(folder, config, WEIGHTS_NAME, weights, sketch(base.model, modules_of(weights)))


def load(base: BaseModel, folder: Path, any_base: bool = False) -> Adapter:
    """Attach a LoRA or DoRA adapter that mlx-lm, or `write`, made.

    Raises:
        ConfigError: adapter_config.json does not describe one for this model.
        WeightsError: a tensor is missing, unexpected, misshapen or not finite, or adapts stacked
            experts; or the adapter was made on another base.
        FileFormatError: a file is absent or malformed.
    """
    path, file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    with naming(path):
        content = read_json(path)
        config = _read_config(content)
        weights = read_safetensors(file)
        require_no_experts(base.model, weights, file)
        expected = expected_arrays(base.model, config)
    require_fit(expected, weights, file)
    about = read_metadata(file)
    require_base(base, modules_of(expected), about, content.get("model"), file, any_base)
    return attach(base.model, config, weights)


def _read_config(config: dict[str, object]) -> LoRAConfig:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConfigError(
            f"fine_tune_type {reprlib.repr(kind)} is not supported", cure="Use lora or dora."
        )
    parameters, num_layers = config.get("lora_parameters"), config.get("num_layers")
    if not isinstance(parameters, dict):
        raise ConfigError("needs an object 'lora_parameters'")
    numbers = {name: parameters.get(name) for name in ("rank", "scale", "dropout")}
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        raise ConfigError(f"num_layers must be a whole number, got {reprlib.repr(num_layers)}")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            got = reprlib.repr(value)
            raise ConfigError(f"lora_parameters.{name} must be a number, got {got}")
    keys = ALL_LINEAR if parameters.get("keys") is None else parameters["keys"]
    if keys != ALL_LINEAR and not _is_list_of_names(keys):
        raise ConfigError("lora_parameters.keys must be a list of module names")
    if numbers["rank"] > LARGEST_RANK:
        raise ConfigError(f"lora_parameters.rank is beyond reason: {numbers['rank']}")
    return LoRAConfig(
        rank=numbers["rank"],
        alpha=numbers["scale"] * numbers["rank"],
        dropout=numbers["dropout"],
        target_modules=keys,
        num_layers=num_layers if num_layers > 0 else None,  # mlx-lm: 0 or less means all
        use_dora=kind == "dora",
    )


def _is_list_of_names(keys: object) -> bool:
    return isinstance(keys, list) and bool(keys) and all(isinstance(key, str) for key in keys)
