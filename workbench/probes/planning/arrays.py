"""Arrays that have a shape and a layout but no numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

FLOAT32 = 4  # bytes
VIEW, COMPUTED = 1, 2  # entries in the CPU stream's queue: release the inputs; compute before that


class ShapeArray:
    """One array of a lazy graph.

    Args:
        op: the operation that makes it, under MLX's name.
        inputs: the arrays it is made of.
        shape: as in MLX.
        itemsize: bytes of one number.
        strides: in numbers; row by row if None.
        data_size: numbers that its buffer holds; fewer than the shape's if it is broadcast.
        dense: whether the buffer holds nothing else; not so for a slice.
        base: the input whose buffer it lives in; None if it has its own.
    """

    __slots__ = (
        "base",
        "data_size",
        "dense",
        "donors",
        "inputs",
        "itemsize",
        "label",
        "leader",
        "op",
        "options",
        "queued",
        "ready",
        "shape",
        "siblings",
        "strides",
        "temporary",
        "trains",
    )

    def __init__(
        self,
        op: str,
        inputs: tuple[ShapeArray, ...],
        shape: tuple[int, ...],
        itemsize: int,
        *,
        strides: tuple[int, ...] | None = None,
        data_size: int | None = None,
        dense: bool = True,
        base: ShapeArray | None = None,
    ):
        self.op, self.inputs, self.shape, self.itemsize = op, inputs, shape, itemsize
        self.strides = rows_of(shape) if strides is None else strides
        self.data_size = math.prod(shape) if data_size is None else data_size
        self.dense, self.base = dense, base
        self.queued = COMPUTED if base is None else VIEW
        self.donors: tuple[ShapeArray, ...] = ()  # inputs whose buffer it may take over
        self.temporary = 0  # bytes that the operation needs beside its output
        self.label = ""  # the part of the plan that its buffer belongs to
        self.options: tuple = ()  # of the operation, for its derivative
        self.ready = False  # evaluated already
        self.siblings: tuple[ShapeArray, ...] = ()  # further outputs of the same operation,
        self.leader: ShapeArray | None = None  # and, for those, the first
        self.trains = any(array.trains for array in inputs)  # a gradient goes through it

    @property
    def size(self) -> int:
        """Numbers that the shape stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, if it gets one."""
        return self.data_size * self.itemsize

    @property
    def row_contiguous(self) -> bool:
        """Whether the numbers lie row by row, without gaps."""
        return self.data_size == self.size and _agree(self.strides, rows_of(self.shape), self.shape)

    @property
    def column_contiguous(self) -> bool:
        """Whether they lie column by column."""
        columns = rows_of(self.shape[::-1])[::-1]
        return self.data_size == self.size and _agree(self.strides, columns, self.shape)


def rows_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array that lies row by row."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _agree(strides: Sequence[int], wanted: Sequence[int], shape: Sequence[int]) -> bool:
    return all(a == b for a, b, length in zip(strides, wanted, shape) if length > 1)


def reshaped_strides(x: ShapeArray, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Strides of x's numbers in another shape; None if they must be copied for that."""
    if x.row_contiguous:
        return rows_of(shape)
    runs = _runs(x)
    strides: list[int] = []
    for length in shape:
        if runs and runs[0][0] % length == 0:
            rest, step = runs[0][0] // length, runs[0][1]
            strides.append(rest * step)
            runs = [(rest, step), *runs[1:]] if rest > 1 else runs[1:]
        elif length == 1:
            strides.append(strides[-1])
        else:
            return None
    return tuple(strides)


def _runs(x: ShapeArray) -> list[tuple[int, int]]:
    """(length, stride) of x's axes, those joined that lie as one."""
    runs: list[tuple[int, int]] = []
    for length, stride in zip(x.shape, x.strides):
        if length == 1:
            continue
        if runs and runs[-1][1] == length * stride:
            runs[-1] = (runs[-1][0] * length, stride)
        else:
            runs.append((length, stride))
    return runs


def fits_blas(x: ShapeArray) -> bool:
    """Whether the last two axes are a plain or a transposed matrix; others are copied first."""
    rows, columns = x.shape[-2:]
    return x.strides[-2:] in ((columns, 1), (1, rows))
