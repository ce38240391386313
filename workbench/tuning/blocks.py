"""An optimizer's update in blocks: small parameters joined, large ones cut.

The rule of an optimizer is a dozen operations. On few numbers each costs little more than its
dispatch; on many, each reads and writes main memory, while a block of some hundred thousand stays
in a CPU's cache from one operation to the next. On a GPU joining saves kernels, cutting memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from workbench.blocks import UPDATE_NUMBERS, grouped, in_rows, joined, parted, rows_in_block


@dataclass(slots=True)
class _Part:
    """One parameter of an update, old or new."""

    gradient: mx.array
    parameter: mx.array
    state: dict[str, mx.array]  # the optimizer's own

    def __post_init__(self):
        arrays = self.parameter, *self.state.values()
        assert all(array.shape == self.gradient.shape for array in arrays), "not by single numbers"

    @property
    def size(self) -> int:
        return self.gradient.size

    @property
    def kind(self) -> tuple:
        """What parameters must have in common to be joined."""
        states = tuple((key, array.dtype) for key, array in self.state.items())
        return self.gradient.dtype, self.parameter.dtype, states


class Blockwise:
    """Comes before an optimizer of MLX in a class's bases, and applies its rule block by block.

    Only for a rule that treats every number by itself, with a state in the parameter's shape: its
    `apply_single` gets the numbers of several parameters as one vector, or some rows of one. New
    weights and state are equal to the bit with those of the optimizer alone, under the same names.

    Each block is evaluated before the next, so that beside old and new arrays memory holds no more
    than one block needs; hence an update cannot be part of a function that MLX compiles.
    """

    block_numbers: int | None = None  # in a block, at most; None: what suits the device

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The new parameters, in the structure of `gradients`; the state is replaced.

        Args:
            gradients: a tree.
            parameters: a tree with the names of `gradients`, or more, in the same shapes.
        """
        if not self._initialized:
            self.init(gradients)
        super().apply_gradients({}, {})  # counts the step and follows the schedules
        tree = tree_map(_Part, gradients, parameters, self.state)
        parts: list[_Part] = []
        tree_map(parts.append, tree)
        limit = self.block_numbers or UPDATE_NUMBERS[mx.default_device().type.name]
        small = (part for part in parts if part.size <= limit)
        for group in grouped(small, lambda part: part.kind, lambda part: part.size, limit):
            self._apply_joined(group)
        for part in parts:
            if part.size > limit:
                self._apply_cut(part, limit)
        return tree_map(lambda part: part.parameter, tree)

    def _apply_joined(self, parts: Sequence[_Part]) -> None:
        """The rule on parameters of one kind, taken together."""
        state = {key: joined([part.state[key] for part in parts]) for key in parts[0].state}
        gradient = joined([part.gradient for part in parts])
        new = self.apply_single(gradient, joined([part.parameter for part in parts]), state)
        mx.eval(new, state)
        shapes = [part.gradient.shape for part in parts]
        for part, parameter in zip(parts, parted(new, shapes)):
            part.parameter = parameter
        for key, block in state.items():
            for part, array in zip(parts, parted(block, shapes)):
                part.state[key] = array

    def _apply_cut(self, part: _Part, limit: int) -> None:
        """The rule on a large parameter, some rows at a time."""
        shape, keys = part.gradient.shape, list(part.state)
        old = [in_rows(array) for array in (part.gradient, part.parameter, *part.state.values())]
        rows = len(old[0])
        step = rows_in_block(rows, part.size, limit)
        new: list[mx.array] = []
        for start in range(0, rows, step):
            here = slice(start, start + step)
            gradient, parameter, *states = (array[here] for array in old)
            state = dict(zip(keys, states))
            block = [self.apply_single(gradient, parameter, state), *state.values()]
            new = new or [mx.zeros(old[0].shape, array.dtype) for array in block]
            for whole, array in zip(new, block):
                whole[here] = array  # in place: nobody else holds it
            mx.eval(new)
        part.parameter, *states = (array.reshape(shape) for array in new)
        part.state.update(zip(keys, states))
