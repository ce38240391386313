"""Leaving everything as it was: parameters, freeze flags, modes, optimizer state, random state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_map

QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
Container = dict | list | set


@contextlib.contextmanager
def preserved(model: nn.Module, optimizer: object = None) -> Iterator[None]:
    """Whatever the block does to a network and an optimizer is undone afterwards.

    Covers arrays (without copying their bytes), modules that were put in or taken out, freeze
    flags, train and eval modes, optimizer state, and MLX's random state. Every dict and list stays
    the object it is: a compiled step holds on to `model.state` and `optimizer.state`.
    """
    containers: dict[int, Container] = {}
    _collect(model, containers)
    _collect(getattr(optimizer, "__dict__", {}), containers)
    handles: dict[int, mx.array] = {}  # tied parameters stay one object
    contents = [_content(container, handles) for container in containers.values()]
    with preserved_random():
        try:
            yield
        finally:
            for container, content in zip(containers.values(), contents):
                _refill(container, content)


@contextlib.contextmanager
def preserved_random() -> Iterator[None]:
    """The random states of MLX, NumPy and Python come back after the block."""
    (key,) = mx.random.state
    high, low = key.tolist()
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Dropout off and, unless the network is quantised, floating-point parameters in float32.

    A derivative that is measured by differences needs the precision.
    """
    with preserved(model):
        model.eval()
        if not any(isinstance(module, QUANTISED) for module in model.modules()):
            model.update(tree_map(_as_float32, model.parameters()))
        yield


def _as_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _collect(value: object, found: dict[int, Container]) -> None:
    if id(value) in found:
        return
    if isinstance(value, dict | list | set):
        found[id(value)] = value
    if isinstance(value, nn.Module | Optimizer):
        _collect(vars(value), found)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for item in value:
        _collect(item, found)


def _content(container: Container, handles: dict[int, mx.array]) -> Container:
    """What a container holds; of an array, a second handle on the same bytes.

    `array += …` and `array[…] = …` change the very object that a network holds.
    """

    def handle(item: object) -> object:
        if isinstance(item, mx.array):
            return handles.setdefault(id(item), mx.array(item))
        return item

    if isinstance(container, dict):
        return {key: handle(item) for key, item in container.items()}
    return [handle(item) for item in container]


def _refill(container: Container, content: Container) -> None:
    if isinstance(container, dict):
        dict.clear(container)
        dict.update(container, content)
    elif isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)
