"""The operations that join arrays without numbers to a graph.

What an operation allocates follows MLX 0.32: transposes, slices and broadcasts share their input's
buffer, everything else gets one of its own unless it may write over an input that nobody needs any
more. That is decided in the order of evaluation, by `schedule.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from workbench.probes.planning.arrays import (
    FLOAT32,
    ShapeArray,
    fits_blas,
    reshaped_strides,
)


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

    def visible(self, length: int, seen: int) -> ShapeArray:
        """(T, S): whether one of the last T positions sees a key."""
        keys, queries = (self.fresh("Arange", (n,), FLOAT32) for n in (seen, length))
        keys, queries = self.reshape(keys, (1, seen)), self.reshape(queries, (length, 1))
        shape = (length, seen)
        both = self.broadcast(keys, shape), self.broadcast(queries, shape)
        return self.fresh("LessEqual", shape, 1, *both)

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
        return self._alias(op, x, (*others, x))

    def after(
        self, arrays: Sequence[ShapeArray], others: Sequence[ShapeArray]
    ) -> tuple[ShapeArray, ...]:
        """The arrays themselves, known to come after others (mx.depends)."""
        inputs = (*arrays, *others)
        return self._together([self._alias("Depends", x, inputs) for x in arrays])

    def leaf(self, x: ShapeArray) -> ShapeArray:
        """x itself, where a gradient by it is to end."""
        made = self.same("Copy", x)
        made.trains = True
        return made

    def custom(
        self, inputs: Sequence[ShapeArray], outputs: Sequence[ShapeArray], derivative: Callable
    ) -> tuple[ShapeArray, ...]:
        """The outputs of mx.custom_function, computed together.

        Args:
            inputs: what it is called with.
            outputs: what it has made of them; MLX's own derivatives end there.
            derivative: (graph, first of the outputs, its gradient) → pairs (input, its gradient).
        """
        stopped = [self.same("StopGradient", x) for x in outputs]
        for array in stopped:
            array.trains = False
        made = [self._alias("Custom", x, (*inputs, *stopped)) for x in stopped]
        made[0].options = (derivative,)
        return self._together(made)

    @staticmethod
    def _together(made: Sequence[ShapeArray]) -> tuple[ShapeArray, ...]:
        """Several outputs of one operation."""
        first, *others = made
        first.siblings = tuple(others)
        for array in others:
            array.leader = first
        return (first, *others)

    def _alias(self, op: str, x: ShapeArray, inputs: tuple[ShapeArray, ...]) -> ShapeArray:
        return self._made(
            ShapeArray(
                op,
                inputs,
                x.shape,
                x.itemsize,
                strides=x.strides,
                data_size=x.data_size,
                dense=x.dense,
                base=x,
            )
        )

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
        if x.shape == tuple(shape):
            return x
        strides = reshaped_strides(x, shape)
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

    def slice(self, x: ShapeArray, axis: int, length: int) -> ShapeArray:
        """A part of an axis; x if it is all of it."""
        if x.shape[axis] == length:
            return x
        shape = list(x.shape)
        shape[axis] = length
        return self.view("Slice", x, shape, x.strides, dense=False)

    def concatenate(self, parts: Sequence[ShapeArray], axis: int) -> ShapeArray:
        """The parts along an axis; the part itself if there is one only."""
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        made = self.fresh("Concatenate", shape, parts[0].itemsize, *parts)
        made.queued, made.options = len(parts) + 1, (axis,)
        return made

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
        elif a.column_contiguous and b.column_contiguous:
            like, donors = a, (a, b)
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

    def times(self, x: ShapeArray) -> ShapeArray:
        """A constant · x."""
        return self.multiply(self.scalar(x.shape, x.itemsize), x)

    def spread(self, op: str, x: ShapeArray, by: ShapeArray) -> ShapeArray:
        """An elementwise operation on x and an array that is broadcast to its shape."""
        return self.binary(op, x, self.broadcast(by, x.shape))

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
            if not fits_blas(x):
                made.temporary += x.size * x.itemsize
                made.queued += 1
        return self._made(made)

    def add_product(self, c: ShapeArray, a: ShapeArray, b: ShapeArray) -> ShapeArray:
        """c (n, m) + a (n, k) · b (k, m), computed in c if it lies row by row (mx.addmm)."""
        product = self.matmul(a, b)
        product.op, product.inputs = "AddMM", (*product.inputs, c)
        if c.row_contiguous:
            product.donors = (c,)
        else:
            product.queued += 1
        return product
