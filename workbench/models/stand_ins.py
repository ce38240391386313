"""Standing in a module's place: on one network, for the length of a `with` block.

No class is touched, so a notebook cell can run twice, and whatever happens the modules come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import mlx.nn as nn

from workbench.models.structure import module_at, put_module


class StandIn:
    """Stands in a module's place: calls go through `call`, everything else to the module."""

    def __init__(self, module: nn.Module, call: Callable):
        self._module, self._call = module, call

    def __call__(self, *args, **kwargs):
        return self._call(self._module, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def __getitem__(self, key):
        return self._module[key]

    def __setitem__(self, key, value) -> None:
        self._module[key] = value

    def __contains__(self, key) -> bool:
        return key in self._module


class LinearStandIn(StandIn):
    """Stands in an embedding's place: `as_linear` goes through `call`, all else to the embedding.

    `call` gets the embedding and the hidden states, as a head that is not tied would.
    """

    def __call__(self, *args, **kwargs):
        return self._module(*args, **kwargs)

    def as_linear(self, *args, **kwargs):
        return self._call(self._module, *args, **kwargs)


@contextlib.contextmanager
def intercepted(
    model: nn.Module, calls: dict[str, Callable], kind: type[StandIn] = StandIn
) -> Iterator[None]:
    """Put `call(module, *args, **kwargs)` in the place of modules' calls, by path."""
    # The innermost first: a module inside another is reached through the original.
    paths = sorted(calls, key=lambda path: -path.count("."))
    originals = [(path, module_at(model, path)) for path in paths]
    try:
        for path, module in originals:
            put_module(model, path, kind(module, calls[path]))
        yield
    finally:
        for path, module in reversed(originals):
            put_module(model, path, module)
