"""Listening to a network: what goes into its modules, and what comes out.

A recorder stands in a module's place on this one network, for the length of a `with` block; no
class is touched, so a notebook cell that records can run twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from workbench.models.stand_ins import intercepted


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    path: str
    args: tuple
    kwargs: dict
    output: object

    @property
    def inputs(self) -> mx.array | None:
        """The first array among its arguments, the positional ones first."""
        arguments = [*self.args, *self.kwargs.values()]
        return next((arg for arg in arguments if isinstance(arg, mx.array)), None)

    def with_inputs(self, inputs: mx.array) -> tuple[tuple, dict]:
        """Its arguments with another array in the place of `inputs`."""
        args = tuple(inputs if arg is self.inputs else arg for arg in self.args)
        kwargs = {k: inputs if arg is self.inputs else arg for k, arg in self.kwargs.items()}
        return args, kwargs

    @property
    def result(self) -> mx.array | None:
        """The array it returned; of a tuple, the first."""
        output = self.output
        if isinstance(output, tuple | list) and output:
            output = output[0]
        return output if isinstance(output, mx.array) else None


@contextlib.contextmanager
def recorded(model: nn.Module, paths: Sequence[str] | None = None) -> Iterator[list[Call]]:
    """Record the calls of modules, in the order in which they return.

    Args:
        model: the network.
        paths: of the modules to listen to; all but the network itself if None.
    """
    heard: list[Call] = []

    def listen(path: str) -> Callable:
        def call(module, *args, **kwargs):
            output = module(*args, **kwargs)
            heard.append(Call(path, args, kwargs, output))
            return output

        return call

    if paths is None:
        paths = [path for path, _ in model.named_modules() if path]
    with intercepted(model, {path: listen(path) for path in paths}):
        yield heard
