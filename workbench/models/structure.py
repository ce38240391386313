"""Finding modules in a network by their path, and putting others in their place."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.errors import ConfigError


def find_layers(model: nn.Module) -> tuple[str, int]:
    """Path of the network's list of decoder layers, and how many there are.

    Told by structure: the list of modules that holds the most parameters. A list inside another
    one, such as a layer's experts, is a part of it.

    Raises:
        ConfigError: there is no list of modules.
    """
    lists = list(_lists_of_modules(model))
    if not lists:
        raise ConfigError(
            f"cannot find the layers of a {type(model).__name__}",
            cure="A network keeps its layers in a list of modules, such as model.layers.",
        )
    path, layers = lists[0] if len(lists) == 1 else max(lists, key=lambda found: _size(found[1]))
    return path, len(layers)


def _lists_of_modules(place: object, path: str = "") -> Iterator[tuple[str, list]]:
    """The outermost lists that hold modules, or what stands in for them, with their paths."""
    if isinstance(place, list):
        if place and all(callable(getattr(item, "parameters", None)) for item in place):
            yield path, place
    elif isinstance(place, dict):
        for name, inner in place.items():
            yield from _lists_of_modules(inner, f"{path}.{name}" if path else name)


def _size(layers: list[nn.Module]) -> int:
    """Bytes of the parameters."""
    arrays = (leaf for layer in layers for _, leaf in tree_flatten(layer.parameters()))
    return sum(array.nbytes for array in arrays)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path such as `model.layers.3.self_attn`; the model at an empty one."""
    place = model
    for part in path.split(".") if path else ():
        place = place[int(part)] if isinstance(place, list) else place[part]
    return place


def put_module(model: nn.Module, path: str, module: object) -> None:
    """Put a module, or anything that is called like one, at a dotted path."""
    parent, _, name = path.rpartition(".")
    place = module_at(model, parent)
    place[int(name) if isinstance(place, list) else name] = module
