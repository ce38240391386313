"""Arrays that have a shape and a layout but no numbers, and the operations that join them.

What an operation allocates follows MLX 0.32: transposes, slices and broadcasts share their input's
buffer, everything else gets one of its own unless it may write over an input that nobody needs any
more. That is decided in the order of evaluation, by `schedule.py`.
"""

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
        "op",
        "options",
        "queued",
        "ready",
        "shape",
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
        return self.data_size == self.size and all(
            stride == wanted
            for stride, wanted, length in zip(self.strides, rows_of(self.shape), self.shape)
            if length > 1
        )


def rows_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array that lies row by row."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


class Graph:
    """Makes arrays. What it makes belongs to the part `label` of the plan."""

    def __init__(self, label: str = ""):
        self.label = label
        self.arrays: list[ShapeArray] = []  # in the order of their making

    def _made(self, array: ShapeArray) -> ShapeArray:
        array.label = self.label
        self.arrays.append(array)
        return array

    def held(
        self, shape: Sequence[int], itemsize: int, label: str, trains: bool = False
    ) -> ShapeArray:
        """An array that is in memory before the evaluation begins: a weight, an optimizer state."""
        array = ShapeArray("held", (), tuple(shape), itemsize)
        array.ready, array.trains, array.label = True, trains, label
        return array

    def fresh(
        self,
        op: str,
        shape: Sequence[int],
        itemsize: int,
        *inputs: ShapeArray,
        donors: tuple[ShapeArray, ...] = (),
    ) -> ShapeArray:
        """The output of any other operation; it may write over `donors`."""
        made = ShapeArray(op, inputs, tuple(shape), itemsize)
        made.donors = donors
        return self._made(made)

    def zeros(self, shape: Sequence[int], itemsize: int) -> ShapeArray:
        """A buffer of zeros."""
        return self.fresh("Full", shape, itemsize, self.scalar(shape, itemsize))

    def view(self, op: str, x: ShapeArray, shape, strides, dense: bool = True) -> ShapeArray:
        """Another look at the same buffer."""
        return self._made(
            ShapeArray(
                op,
                (x,),
                tuple(shape),
                x.itemsize,
                strides=tuple(strides),
                data_size=x.data_size if dense else math.prod(shape),
                dense=dense and x.dense,
                base=x,
            )
        )

    def same(self, op: str, x: ShapeArray, *others: ShapeArray) -> ShapeArray:
        """x itself, known to come after other arrays."""
        made = self._made(
            ShapeArray(
                op,
                (*others, x),
                x.shape,
                x.itemsize,
                strides=x.strides,
                data_size=x.data_size,
                dense=x.dense,
                base=x,
            )
        )
        return made

    def transpose(self, x: ShapeArray, *axes: int) -> ShapeArray:
        """Axes in another order."""
        made = self.view(
            "Transpose", x, [x.shape[a] for a in axes], [x.strides[a] for a in axes], x.dense
        )
        made.options = axes
        return made

    def swap_last(self, x: ShapeArray) -> ShapeArray:
        """The last two axes exchanged."""
        last = len(x.shape) - 1
        return self.transpose(x, *range(last - 1), last, last - 1)

    def reshape(self, x: ShapeArray, shape: Sequence[int]) -> ShapeArray:
        """The same numbers in another shape; a copy if axes join that do not lie row by row."""
        strides = rows_of(shape) if x.row_contiguous else _split_strides(x, shape)
        if strides is None:
            return self.fresh("Reshape", shape, x.itemsize, x)
        return self.view("Reshape", x, shape, strides)

    def split(self, x: ShapeArray, axis: int, lengths: Sequence[int]) -> ShapeArray:
        """One axis becomes several; never a copy."""
        return self.reshape(x, (*x.shape[:axis], *lengths, *x.shape[axis + 1 :]))

    def broadcast(self, x: ShapeArray, shape: Sequence[int]) -> ShapeArray:
        """Repeated along axes of length 1 and along new ones in front; x if nothing changes."""
        if x.shape == tuple(shape):
            return x
        own = (1,) * (len(shape) - len(x.shape)) + x.shape
        strides = (0,) * (len(shape) - len(x.shape)) + x.strides
        repeated = [0 if a != b else s for a, b, s in zip(own, shape, strides)]
        return self.view("Broadcast", x, shape, repeated)

    def scalar(self, shape: Sequence[int], itemsize: int = FLOAT32) -> ShapeArray:
        """A constant, repeated to a shape; it takes no memory to speak of."""
        return self.broadcast(self.held((), itemsize, ""), shape)

    def slice_last(self, x: ShapeArray, length: int) -> ShapeArray:
        """A part of the last axis."""
        return self.view("Slice", x, (*x.shape[:-1], length), x.strides, dense=False)

    def unary(self, op: str, x: ShapeArray, itemsize: int | None = None) -> ShapeArray:
        """An elementwise operation on one array; AsType with another itemsize."""
        itemsize = itemsize or x.itemsize
        if x.dense:
            made = ShapeArray(op, (x,), x.shape, itemsize, strides=x.strides, data_size=x.data_size)
            made.donors = (x,) if itemsize == x.itemsize else ()
        else:
            made = ShapeArray(op, (x,), x.shape, itemsize)
        return self._made(made)

    def cast(self, x: ShapeArray, itemsize: int) -> ShapeArray:
        """Another width of number; x if it has that already."""
        return x if x.itemsize == itemsize else self.unary("AsType", x, itemsize)

    def binary(self, op: str, a: ShapeArray, b: ShapeArray) -> ShapeArray:
        """An elementwise operation on two arrays of one shape, in the wider of their types."""
        itemsize = max(a.itemsize, b.itemsize)
        a, b = self.cast(a, itemsize), self.cast(b, itemsize)
        like = None
        if b.data_size == 1 and a.dense:
            like, donors = a, (a,)
        elif a.data_size == 1 and b.dense:
            like, donors = b, (b,)
        elif a.row_contiguous and b.row_contiguous:
            donors = (a, b)
        else:
            donors = tuple(x for x in (a, b) if x.row_contiguous)
        layout = {"strides": like.strides, "data_size": like.data_size} if like else {}
        made = ShapeArray(op, (a, b), a.shape, itemsize, **layout)
        made.donors = donors
        return self._made(made)

    def multiply(self, a: ShapeArray, b: ShapeArray) -> ShapeArray:
        """a · b, of one shape."""
        return self.binary("Multiply", a, b)

    def add(self, a: ShapeArray, b: ShapeArray) -> ShapeArray:
        """a + b, of one shape."""
        return self.binary("Add", a, b)

    def subtract(self, a: ShapeArray, b: ShapeArray) -> ShapeArray:
        """a - b, of one shape."""
        return self.binary("Subtract", a, b)

    def sum_last(self, x: ShapeArray) -> ShapeArray:
        """The sum over the last axis, which stays with length 1."""
        return self.fresh("Sum", (*x.shape[:-1], 1), x.itemsize, x)

    def matmul(self, a: ShapeArray, b: ShapeArray) -> ShapeArray:
        """a (…, n, k) times b (…, k, m); a matrix b flattens the axes before a's last."""
        itemsize = max(a.itemsize, b.itemsize)
        a, b = self.cast(a, itemsize), self.cast(b, itemsize)
        if len(a.shape) > 2 and len(b.shape) == 2:
            flat = self.reshape(a, (a.size // a.shape[-1], a.shape[-1]))
            product = self.matmul(flat, b)
            return self.split(product, 0, a.shape[:-1])
        batch = a.shape[:-2]
        b = self.broadcast(b, (*batch, *b.shape[-2:]))
        made = ShapeArray("Matmul", (a, b), (*batch, a.shape[-2], b.shape[-1]), itemsize)
        for x in (a, b):
            if not _fits_blas(x):
                made.temporary += x.size * x.itemsize
                made.queued += 1
        return self._made(made)


def _split_strides(x: ShapeArray, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Strides in a shape that only parts axes of x; None if it joins any."""
    strides, rest = [], list(shape)
    for length, stride in zip(x.shape, x.strides):
        parts = [rest.pop(0)] if rest else [0]
        while math.prod(parts) < length and rest:
            parts.append(rest.pop(0))
        if math.prod(parts) != length:
            return None
        strides += [stride * step for step in rows_of(parts)]
    return tuple(strides) if math.prod(rest) == 1 and not rest else None


def _fits_blas(x: ShapeArray) -> bool:
    """Whether the last two axes are a plain or a transposed matrix; others are copied first."""
    rows, columns = x.shape[-2:]
    return x.strides[-2:] in ((columns, 1), (1, rows))
