"""What a run is bound to: its configuration, its data, its base model; and where it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.blas import load_blas
from workbench.data.datasets import Dataset
from workbench.data.examples import Example, all_sides
from workbench.data.streams import StreamDataset
from workbench.models.loading import BaseModel
from workbench.probes.parameters import fingerprint
from workbench.runs.store import as_config
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora_layers import DoRALinear, LoRALinear
from workbench.tuning.objectives import ObjectiveConfig

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer

FREE_TO_CHANGE = (  # settings that leave every number as it is
    "cache_limit_bytes",
    "memory_limit_bytes",
    "checkpoint_every",
    "keep_checkpoints",
    "reload_every",
    "reload_above_bytes",
)
ONE_BY_ONE = ("network", "adapter")  # what an older run does not know of them is not compared
FIRST_SEED = "seed of the first weights"
LONGEST_VALUE = 60  # characters of a setting, in words


def identity(
    base: BaseModel,
    data: Dataset,
    config: TrainConfig,
    objective: ObjectiveConfig | None = None,
    num_ranks: int = 1,
) -> dict[str, object]:
    """What must be the same for a run to go on: settings, network, hashes of data and weights.

    Hashing the frozen weights takes about a second for 500 MB.
    """
    model = base.model
    trainable = tree_flatten(model.trainable_parameters())
    shapes = {name: [*array.shape, str(array.dtype)] for name, array in trainable}
    frozen = {name: digest for name, digest in fingerprint(model).items() if name not in shapes}
    streamed = isinstance(data, StreamDataset)  # whose files are compared by its position
    return {
        "settings": _settings(config, objective, num_ranks) | (data.settings if streamed else {}),
        "training data": "a stream" if streamed else _hash_examples(data.train),
        "validation data": _hash_examples(data.valid),
        "base model": hashlib.sha256(repr(sorted(frozen.items())).encode()).hexdigest(),
        "what trains": hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest(),
        "network": network_settings(base),
        "adapter": _adapter_in_words(model),
    }


def network_settings(base: BaseModel) -> dict[str, object]:
    """What a network computes beside its weights, `num_attention_heads` and the like, as JSON."""
    config = base.config
    known = dataclasses.is_dataclass(config) and not isinstance(config, type)
    settings = dataclasses.asdict(config) if known else dict(base.raw_config)
    if base.seed is not None:
        settings[FIRST_SEED] = base.seed
    return json.loads(json.dumps(settings, default=lambda value: type(value).__name__))


def adapter_settings(model: nn.Module) -> dict[str, object]:
    """kind, rank, scale and dropout of the adapted layers; empty without an adapter.

    They are read off the network, however the adapter came there. Where layers differ, a list
    has each one's, in their order.
    """
    layers = [module for _, module in model.named_modules() if isinstance(module, LoRALinear)]
    found: dict[str, list[object]] = {
        "kind": ["DoRA" if isinstance(layer, DoRALinear) else "LoRA" for layer in layers],
        "rank": [layer.lora_a.shape[1] for layer in layers],
        "scale": [float(layer.scale) for layer in layers],
        "dropout": [float(layer.dropout_rate) for layer in layers],
    }
    return {name: _one_or_all(values) for name, values in found.items() if values}


def run_config(trainer: Trainer) -> dict[str, object]:
    """What a run folder says of the run: how it trains, which model, on what, and where."""
    parts: dict[str, object] = {
        "train": trainer.config,
        "model": trainer.base.name,
        "data": trainer.data.name,
        "prefix": str(trainer.prefix),
    }
    if not trainer.ranks.alone:
        parts["ranks"] = trainer.ranks.size
    if trainer.objective is not None:
        parts["objective"] = trainer.objective.config
    if adapter := adapter_settings(trainer.model):
        parts["adapter"] = adapter
    versions = {"python": platform.python_version(), "workbench": _workbench_version()}
    whole = environment() | versions
    return as_config(**parts, environment=whole, network=network_settings(trainer.base))


def differences(
    before: Mapping[str, object], now: Mapping[str, object], than: str = "was"
) -> list[str]:
    """What is not the same, in words; settings one by one, "seed is 8, was 4".

    A setting of the training that the older run does not know had its default; one of the network
    or the adapter is not compared.
    """
    found = [
        f"the {name} is another" if name != "what trains" else "what trains is another"
        for name in now
        if name not in ("settings", *ONE_BY_ONE) and before.get(name) != now[name]
    ]
    for part in ONE_BY_ONE:
        known = before.get(part)
        for name, was in known.items() if isinstance(known, Mapping) and now[part] else ():
            value = now[part].get(name)
            if value != was:
                found.append(f"{name} is {_short(value)}, {than} {_short(was)}")
    old = before.get("settings")
    old = old if isinstance(old, Mapping) else {}
    defaults = _settings(TrainConfig())
    for name, value in now["settings"].items():
        was = old.get(name, defaults.get(name))
        if was != value:
            found.append(f"{name} is {value!r}, {than} {was!r}")
    return found


def environment() -> dict[str, str]:
    """What bit-equal results depend on beside the run itself."""
    return {
        "mlx": mx.__version__,
        "BLAS": load_blas().name,
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _settings(
    config: TrainConfig, objective: ObjectiveConfig | None = None, num_ranks: int = 1
) -> dict[str, object]:
    """Settings that numbers depend on, as JSON gives them back."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_TO_CHANGE}
    settings["number of ranks"] = num_ranks
    settings["objective"] = type(objective).__name__ if objective else None
    if objective:
        own = dataclasses.asdict(objective)
        settings |= {f"objective.{name}": value for name, value in own.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def _adapter_in_words(model: nn.Module) -> dict[str, object]:
    """The adapter's settings, and alpha, which most people choose instead of the scale."""
    settings = adapter_settings(model)
    if not settings or isinstance(settings["scale"], list) or isinstance(settings["rank"], list):
        return settings
    return settings | {"alpha (scale × rank)": settings["scale"] * settings["rank"]}


def _one_or_all(values: list[object]) -> object:
    return values[0] if all(value == values[0] for value in values) else values


def _short(value: object) -> str:
    """A setting in words: whole numbers without a point, long lists cut."""
    text = repr(value).removesuffix(".0") if isinstance(value, float) else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _hash_examples(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256(f"{len(examples)}".encode())
    for example in all_sides(examples):
        digest.update(example.tokens.astype("<i8").tobytes())
        digest.update(example.loss_mask.astype("u1").tobytes())
        if example.authority_weight is not None or example.provenance_entropy is not None:
            digest.update(repr((example.authority_weight, example.provenance_entropy)).encode())
    return digest.hexdigest()


def _workbench_version() -> str:
    try:
        return importlib.metadata.version("mlx-lora-workbench")
    except importlib.metadata.PackageNotFoundError:  # used from its source
        return "not installed"
