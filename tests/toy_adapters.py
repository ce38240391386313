"""Toy models with an adapter that has moved, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from tests.toy import toy_base
from workbench.models.loading import BaseModel
from workbench.tuning.lora import LoRAConfig, add_lora

TOKENS = mx.array([[5, 9, 100, 33, 7, 64, 200]])

CONFIG = LoRAConfig(rank=3, alpha=10, dropout=0.25, target_modules=["q_proj", "up_proj"])


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Move an adapter as far as training would, and further."""

    def noise(path, array):
        key = mx.random.key(seed + sum(path.encode()))
        return 0.3 * mx.random.normal(array.shape, key=key)

    model.update(tree_map_with_path(noise, model.trainable_parameters()))


def adapted(config: LoRAConfig = CONFIG, seed: int = 0) -> BaseModel:
    """A toy with an adapter, dropout off."""
    base = toy_base()
    base.model.eval()
    add_lora(base.model, config)
    randomise(base.model, seed)
    return base


def same(one: Mapping[str, mx.array], other: Mapping[str, mx.array]) -> bool:
    """Whether names and bits are equal."""
    return one.keys() == other.keys() and all(mx.array_equal(one[n], other[n]) for n in one)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
