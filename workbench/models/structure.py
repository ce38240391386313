"""Finding modules in a network by their path, and putting others in their place."""

from __future__ import annotations

import mlx.nn as nn

from workbench.errors import ConfigError

LAYER_PATHS = ("model.layers", "layers", "transformer.h", "backbone.layers")


def find_layers(model: nn.Module) -> tuple[str, int]:
    """Path of the network's list of layers, and how many there are.

    Raises:
        ConfigError: it is at none of the places that are known.
    """
    for path in LAYER_PATHS:
        place: object = model
        for part in path.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, list) and place:
            return path, len(place)
    raise ConfigError(
        f"cannot find the layers of a {type(model).__name__}",
        cure=f"Looked for a list of modules at {', '.join(LAYER_PATHS)}.",
    )


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
