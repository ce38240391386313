"""What a run is bound to: its configuration, its data, its base model; and where it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
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
from workbench.probes.parameters import fingerprint
from workbench.runs.store import as_config
from workbench.tuning.config import TrainConfig
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


def identity(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    objective: ObjectiveConfig | None = None,
    num_ranks: int = 1,
) -> dict[str, object]:
    """What must be the same for a run to go on: settings, hashes of data and frozen weights.

    Hashing the frozen weights takes about a second for 500 MB.
    """
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
    }


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
    versions = {"python": platform.python_version(), "workbench": _workbench_version()}
    return as_config(**parts, environment=environment() | versions)


def differences(
    before: Mapping[str, object], now: Mapping[str, object], than: str = "was"
) -> list[str]:
    """What is not the same, in words; settings one by one, "rank is 8, was 4".

    A setting that the older run does not know had its default.
    """
    found = [
        f"the {name} is another" if name != "what trains" else "what trains is another"
        for name in now
        if name != "settings" and before.get(name) != now[name]
    ]
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
