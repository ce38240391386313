"""Gradient checkpointing: a layer keeps its input only, and is computed again in the backward pass.

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, section 3.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import ConfigError, FallbackWarning
from workbench.models.shared_prompt import SharedPrompt
from workbench.models.structure import find_layers, module_at
from workbench.models.trying import set_random_state

VALUES = mx.array | str | int | float | SharedPrompt | None  # arguments that a call cannot change


@contextlib.contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Every decoder layer is checkpointed for the length of a `with` block.

    Stand-ins take the layers' places in the list, with the same parameters, names, freeze flags
    and modes; the layers come back at the end, whatever happens. No class is changed, and a block
    within a block adds nothing. Loss and gradients are those of the plain layers: the same
    operations in the same order, and dropout draws the same numbers again.

    Only what trains gets gradient, as with `nn.value_and_grad`: not the frozen parameters of a
    layer that a caller differentiates by itself. Dropout cannot be drawn again under `mx.compile`.

    Warns:
        FallbackWarning: the layers are not found, or one is called with an object that its call
            may change, such as a KV cache. The plain layer is used then, which keeps everything.
    """
    try:
        path, _ = find_layers(model)
    except ConfigError as error:
        warnings.warn(f"no gradient checkpointing: {error.what}", FallbackWarning, stacklevel=1)
        yield
        return
    places = module_at(model, path)
    layers = list(places)
    stand_ins = {id(layer): _stand_in(layer) for layer in layers}
    places[:] = [stand_ins[id(layer)] for layer in layers]
    try:
        yield
    finally:
        for layer in layers:
            if isinstance(layer, nn.Module):
                dict.update(layer, stand_ins[id(layer)])
        places[:] = layers


class _Checkpointed:
    """Goes before a layer's class: what its call computes is not kept."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        plain = super().__call__
        others = [value for value in _leaves([args, kwargs]) if not isinstance(value, VALUES)]
        if others:
            text = f"a layer takes a {type(others[0]).__name__}, which its call may change"
            warnings.warn(f"no gradient checkpointing: {text}", FallbackWarning, stacklevel=1)
            return plain(*args, **kwargs)
        run = mx.checkpoint(_repeatable(self, plain))
        return run(self.trainable_parameters(), args, kwargs)


def _stand_in(layer: object) -> object:
    """A module of a subclass, with the layer's content; it shares attributes and submodules."""
    if not isinstance(layer, nn.Module) or isinstance(layer, _Checkpointed):
        return layer
    kind = _checkpointed_class(type(layer))
    made = kind.__new__(kind)
    object.__setattr__(made, "__dict__", vars(layer))  # freeze flags and modes stay one thing
    dict.update(made, layer)
    return made


@functools.cache
def _checkpointed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})


def _repeatable(layer: nn.Module, plain: Callable) -> Callable:
    """The layer as a function of its parameters, which computes the same each time it is called."""
    start, drew = mx.random.state[0], None  # drew: whether the first call drew random numbers

    def run(parameters: dict, args: tuple, kwargs: dict) -> object:
        nonlocal drew
        before = layer.trainable_parameters()
        layer.update(parameters)
        try:
            if drew is None:
                output = plain(*args, **kwargs)
                drew = mx.random.state[0] is not start
                return output
            with _random_state(start) if drew else contextlib.nullcontext():
                return plain(*args, **kwargs)
        finally:  # or the arrays of the second pass would stay, with all that they depend on
            layer.update(before)

    return run


@contextlib.contextmanager
def _random_state(key: mx.array) -> Iterator[None]:
    """Draw from a key for the length of a `with` block, then from where the stream was."""
    before = mx.random.state[0]
    set_random_state(key)
    try:
        yield
    finally:
        set_random_state(before)


def _leaves(tree: object) -> Iterator[object]:
    if type(tree) in (list, tuple, dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree
