"""A linear layer with an adapter around it: LoRA, and DoRA, which trains its rows' lengths too."""

from __future__ import annotations

import math
import operator
import weakref
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

SMALLEST = 1e-30  # square of a row's length: a row of zeros has one that can be divided by


class AdapterShape(Protocol):
    """What a layer needs to know of its adapter."""

    rank: int
    dropout: float
    scale: float


class LoRALinear(nn.Module):
    """base(x) + scale · (x @ lora_a) @ lora_b; lora_b starts at zero (Hu et al. 2021).

    With a scale of zero it is the base layer, and costs no more.

    Args:
        linear: the frozen layer, plain or quantised.
        config: rank, scale and dropout.
        key: for lora_a, uniform in ± 1 / sqrt(in), as in the reference implementation.
    """

    parts = ("lora_a", "lora_b")  # that train

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, config: AdapterShape, key: mx.array):
        super().__init__()
        in_dims, out_dims = linear_dims(linear)
        self.linear = linear
        self.scale = config.scale
        self.dropout_rate = config.dropout
        self.dropout = nn.Dropout(config.dropout)
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (in_dims, config.rank), key=key)
        self.lora_b = mx.zeros((config.rank, out_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) → (..., out)."""
        output = self.linear(x)
        return output + self._update(x).astype(output.dtype) if self.scale else output

    def fused_weight(self) -> mx.array:
        """(out, in): the weight of one plain layer that does the same, in float32 at least."""
        weight = plain_weight(self.linear)
        return weight + self.scale * (self.lora_a @ self.lora_b).T

    def _update(self, x: mx.array) -> mx.array:
        narrow = self.scale * (self.dropout(x) @ self.lora_a)  # (..., rank): the cheap place
        return narrow @ self.lora_b


class DoRALinear(LoRALinear):
    """m · (base + update) / ‖base + update‖, row by row; m starts at the base's lengths.

    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, equation 5; the length divided
    by is a constant for the gradient (section 4.3). `m` (out,) is named as in mlx-lm.
    """

    parts = ("lora_a", "lora_b", "m")

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, config: AdapterShape, key: mx.array):
        super().__init__(linear, config, key)
        self._base = self._whole = (), mx.array(0.0)  # what the lengths were made of, and they
        self.m = self._lengths()

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) → (..., out)."""
        if not self.scale:
            return self.linear(x)
        output = _without_bias(self.linear, x)
        output = output + self._update(x).astype(output.dtype)
        output = output * (self.m / self._lengths()).astype(output.dtype)
        return output + self.linear.bias if "bias" in self.linear else output

    def fused_weight(self) -> mx.array:
        """(out, in): the weight of one plain layer that does the same, in float32 at least."""
        fused = super().fused_weight()
        return (self.m / self._lengths())[:, None] * fused if self.scale else fused

    def _lengths(self) -> mx.array:
        """(out,): ‖base + update‖ of each row; outside training kept until something is replaced.

        (w + u)² = w² + 2 w·u + u², with u = scale · (lora_a lora_b)ᵀ, needs no matrix (out, in).
        """
        arrays = self.linear.weight, self.lora_a, self.lora_b
        made_of = (*map(weakref.ref, arrays), self.scale)
        if not self.training and _are_same(self._whole[0], made_of):
            return self._whole[1]
        a, b = _wide(self.lora_a), _wide(self.lora_b)
        along = (_without_bias(self.linear, a.T) * b).sum(axis=0)  # w·u / scale
        square = (b * ((a.T @ a) @ b)).sum(axis=0)  # u² / scale²
        squares = self._base_squares() + 2 * self.scale * along + self.scale**2 * square
        lengths = mx.stop_gradient(mx.sqrt(mx.maximum(squares, SMALLEST)))
        if not self.training:
            self._whole = made_of, lengths
        return lengths

    def _base_squares(self) -> mx.array:
        """(out,): w² of each row of the base."""
        made_of = (weakref.ref(self.linear.weight),)
        if not _are_same(self._base[0], made_of):
            self._base = made_of, plain_weight(self.linear).square().sum(axis=1)
        return self._base[1]


def _are_same(before: tuple, now: tuple) -> bool:
    # An array has one reference object as long as it lives; == would compare the arrays' numbers.
    return len(before) == len(now) and all(map(operator.is_, before, now))


def linear_dims(linear: nn.Linear | nn.QuantizedLinear) -> tuple[int, int]:
    """(in, out) of a linear layer; a quantised one packs several columns into a word."""
    out_dims, in_dims = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        in_dims = in_dims * 32 // linear.bits
    return in_dims, out_dims


def plain_weight(linear: nn.Linear | nn.QuantizedLinear, rows: mx.array | None = None) -> mx.array:
    """(out, in): the weight as numbers, in float32 at least; all of its rows, or some."""
    weight, *others = (
        array if rows is None or array is None else array[rows]
        for array in (linear.weight, linear.get("scales"), linear.get("biases"))
    )
    if isinstance(linear, nn.QuantizedLinear):
        weight = mx.dequantize(
            weight,
            *others,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    return _wide(weight)


def _wide(array: mx.array) -> mx.array:
    """In float32 at least."""
    return array.astype(mx.float32) if array.dtype.size < mx.float32.size else array


def _without_bias(linear: nn.Linear | nn.QuantizedLinear, x: mx.array) -> mx.array:
    output = linear(x)
    return output - linear.bias if "bias" in linear else output
