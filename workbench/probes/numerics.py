"""Numbers that go wrong, by path: NaN, infinity, too large, too small."""

from __future__ import annotations

import html
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
from mlx.utils import tree_flatten

from workbench.errors import ConfigError, check_number

LARGEST, SMALLEST = 1e6, 1e-6  # sizes of a number that are still let pass
KINDS = ("nan", "inf", "overflow", "underflow")
SHOWN = 20  # faults that the text lists
WHOLE = "the array"  # a path for what is no tree


@dataclass(frozen=True)
class Fault:
    """Numbers of one array that go wrong in one way."""

    path: str
    kind: str  # nan, inf, overflow or underflow
    count: int  # numbers
    total: int  # numbers in the array
    first: tuple[int, ...]  # the place of the first one

    def __str__(self) -> str:
        return f"{self.path}: {self.kind} at {list(self.first)}, {self.count} of {self.total:,}"


@dataclass(frozen=True, repr=False)
class NumericsReport:
    """What `check_numerics` found."""

    faults: tuple[Fault, ...]
    num_arrays: int
    largest: float
    smallest: float

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    @property
    def has_nan(self) -> bool:
        """Whether a number is NaN."""
        return bool(self.paths("nan"))

    @property
    def has_inf(self) -> bool:
        """Whether a number is infinite, which is an overflow, too."""
        return bool(self.paths("inf"))

    @property
    def has_overflow(self) -> bool:
        """Whether a number's size is above `largest`."""
        return bool(self.paths("overflow"))

    @property
    def has_underflow(self) -> bool:
        """Whether a number's size is below `smallest`, and not 0."""
        return bool(self.paths("underflow"))

    def paths(self, kind: str) -> list[str]:
        """Paths of the arrays with that fault: nan, inf, overflow or underflow."""
        if kind not in KINDS:
            raise ConfigError(f"unknown kind {kind!r}", cure=f"Use one of {KINDS}.")
        return [fault.path for fault in self.faults if fault.kind == kind]

    def table(self) -> pd.DataFrame:
        """One row a fault: path, kind, count, total, first."""
        return pd.DataFrame([vars(f) for f in self.faults], columns=[*Fault.__dataclass_fields__])

    def __str__(self) -> str:
        sizes = f"sizes up to {self.largest:g}, and 0 or from {self.smallest:g}"
        if self.ok:
            return f"{self.num_arrays} arrays: all finite, {sizes}"
        counts = [f"{len(self.paths(kind))} {kind}" for kind in KINDS if self.paths(kind)]
        lines = [f"{self.num_arrays} arrays: {', '.join(counts)} (let pass: {sizes})"]
        lines += [f"  {fault}" for fault in self.faults[:SHOWN]]
        rest = len(self.faults) - SHOWN
        return "\n".join([*lines, f"  … and {rest} more: see .table()"] if rest > 0 else lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def check_numerics(
    tree: object, *, largest: float = LARGEST, smallest: float = SMALLEST
) -> NumericsReport:
    """Find NaN, infinity, overflow (size > largest) and underflow (0 < size < smallest).

    Args:
        tree: an array, a network (its parameters), or a tree of arrays such as gradients or an
            optimizer's state. Whole numbers and truth values have no such faults; NumPy's arrays
            are looked at as MLX would hold them.
        largest: of a number's size.
        smallest: of a number's size, if it is not 0. Weights drawn at random have smaller ones
            now and then; 0 looks for none.

    Raises:
        ConfigError: a bound is out of range, or a leaf of the tree is no array; names its path.
    """
    check_number("largest", largest, 0)
    check_number("smallest", smallest, 0)
    if smallest > largest:
        raise ConfigError(f"smallest {smallest:g} is above largest {largest:g}")
    leaves = tree_flatten(tree.parameters() if isinstance(tree, nn.Module) else tree)
    faults = [
        fault
        for path, leaf in leaves
        for fault in _faults(path or WHOLE, _array(leaf, path), largest, smallest)
    ]
    return NumericsReport(tuple(faults), len(leaves), largest, smallest)


def _array(leaf: object, path: str) -> mx.array:
    numbers = isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "fiubc"
    if not isinstance(leaf, mx.array | int | float) and not numbers:
        raise ConfigError(
            f"{path or 'this'} is no array, but a {type(leaf).__name__}",
            cure="Give an array, a network, or a tree of arrays such as gradients.",
        )
    with np.errstate(over="ignore"):
        return leaf if isinstance(leaf, mx.array) else mx.array(np.asarray(leaf))


def _faults(path: str, array: mx.array, largest: float, smallest: float) -> list[Fault]:
    if not mx.issubdtype(array.dtype, mx.inexact) or not array.size:
        return []
    sizes = mx.abs(array) if array.dtype == mx.float64 else mx.abs(array).astype(mx.float32)
    wrong = {
        "nan": mx.isnan(sizes),
        "inf": mx.isinf(sizes),
        "overflow": sizes > largest,
        "underflow": (sizes > 0) & (sizes < smallest),
    }
    found = []
    for kind, places in wrong.items():
        count = int(places.sum().item())
        if count:
            flat = int(mx.argmax(places.reshape(-1)).item())
            first = tuple(int(n) for n in np.unravel_index(flat, array.shape))
            found.append(Fault(path, kind, count, array.size, first))
    return found
