"""The settings of `mlx_lm.lora`'s YAML: their defaults and types, and which of them we know."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from workbench.errors import ConfigError, check_number, check_whole

LARGEST_COUNT = 2**63 - 1  # what 64 bits hold
DEFAULTS = {  # as mlx_lm/lora.py has them; a test compares
    "model": "Qwen/Qwen3-0.6b",
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "optimizer_config": {},
    "data": "mlx-community/WikiSQL",
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "adapter_path": "adapters",
    "save_every": 100,
    "test_batches": 500,
    "max_seq_length": 2048,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "lr_schedule": None,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    "mask_prompt": False,
}
ELSEWHERE = {  # what the YAML may say beside, and who does that here
    "train": "",
    "config": "",
    "clear_cache_threshold": "",  # mlx-lm takes it from the command line only
    "trust_remote_code": "",  # likewise; no model's code is ever run here
    "test": "wb.generate and the evaluations ask a trained model",
    "report_to": "give its callback to wb.Trainer as an observer",
    "project_name": "give it to the callback",
    "resume_adapter_file": "wb.load_adapter(base, …) goes on from an adapter",
    "hf_dataset": "give the rows to wb.load_dataset",
    "prompt_feature": "name the rows' columns as wb.load_dataset has them",
    "completion_feature": "name the rows' columns as wb.load_dataset has them",
    "chat_feature": "name the rows' columns as wb.load_dataset has them",
    "text_feature": "name the rows' columns as wb.load_dataset has them",
}
COUNTS = {  # whole numbers: smallest value
    "seed": 0,
    "num_layers": -1,
    "batch_size": 1,
    "iters": 1,
    "val_batches": -1,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "save_every": 1,
    "test_batches": -1,
    "max_seq_length": 2,
    "grad_accumulation_steps": 1,
}
TEXTS = ("model", "fine_tune_type", "optimizer", "data", "adapter_path")
SWITCHES = ("grad_checkpoint", "mask_prompt")
SECTIONS = ("optimizer_config", "lora_parameters", "lr_schedule")
# Options of MLX's optimizers → our names; what is FIXED has no name here, and one value.
FIELDS = {
    "betas": "adam_betas",
    "eps": "adam_epsilon",
    "bias_correction": "bias_correction",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "bias_correction": False}
OPTIONS = {  # optimizer: option → MLX's default
    "adam": ADAM,
    "adamw": {**ADAM, "weight_decay": 0.01},
    "sgd": {"momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False},
    "muon": {"momentum": 0.95, "weight_decay": 0.01, "nesterov": True, "ns_steps": 5},
    "adafactor": {
        "eps": (1e-30, 1e-3),
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta_1": None,
        "weight_decay": 0.0,
        "scale_parameter": True,
        "relative_step": True,
        "warmup_init": False,
    },
}
FIXED = {
    "sgd": {"dampening": 0.0, "nesterov": False},
    "muon": {"nesterov": True, "ns_steps": 5},
    "adafactor": {
        "eps": (1e-30, 1e-3),
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta_1": None,
        "scale_parameter": False,
        "relative_step": False,
        "warmup_init": False,
    },
}


def complete(said: Mapping[str, object]) -> dict[str, object]:
    """All settings: those of the file, checked, and mlx-lm's defaults for the others.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """
    check_keys("", said, [*DEFAULTS, *ELSEWHERE])
    said = {name: value for name, value in said.items() if value is not None}
    settings = {**DEFAULTS, **{name: said[name] for name in said if name in DEFAULTS}}
    for name, smallest in COUNTS.items():
        check_whole(name, settings[name], smallest, LARGEST_COUNT)
    if settings["num_layers"] == 0:
        raise ConfigError("num_layers must be -1, for all layers, or from 1; got 0")
    check_number("learning_rate", settings["learning_rate"], 0)
    for name in TEXTS:
        _require(name, settings[name], str, "text")
    for name in SWITCHES:
        _require(name, settings[name], bool, "true or false")
    for name in SECTIONS:
        if settings[name] is not None:
            _require(name, settings[name], dict, "a mapping")
    return settings


def check_keys(place: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    """Raise ConfigError for a key that is not known; names the nearest one, or all."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            cure = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."
            if (place, key) == ("lora_parameters", "alpha"):
                cure = "mlx-lm takes 'scale', which is alpha / rank."
            within = f" in {place}" if place else ""
            raise ConfigError(f"unknown key {str(key)[:100]!r}{within}", cure=cure)


def _require(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind) or value == "":
        raise ConfigError(f"{name} must be {what}, got {str(value)[:100]!r}")
