"""Model folders that are changed on purpose, and how weights are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.models.files import read_safetensors, write_safetensors

TOKENS = mx.array([[5, 80, 200, 17, 3, 120], [9, 9, 1, 44, 258, 2]])
A_WEIGHT = "model.layers.1.mlp.up_proj.weight"

Tensors = Mapping[str, mx.array]


def weights_of(model: nn.Module) -> dict[str, mx.array]:
    """Parameters by name."""
    return dict(tree_flatten(model.parameters()))


def equal_bits(a: Tensors, b: Tensors) -> bool:
    """Whether two sets of tensors agree in names, dtypes and every bit."""
    same = a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    return same and all(mx.array_equal(a[name], b[name], equal_nan=True).item() for name in a)


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Change the tensors of a model folder in place."""
    tensors = read_safetensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def reconfigure(folder: Path, **changes: object) -> None:
    """Change a folder's config.json; None removes a key."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
