"""Rotary position embedding, and how checkpoints stretch it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx

from workbench.backend import on_gpu
from workbench.errors import ConfigError, WorkbenchError


class RotaryEmbedding:
    """Rotary position embedding in the half-split layout (Su et al. 2021, RoFormer, section 3.4).

    Rotates the pairs (x[i], x[i + dims / 2]) at position p by the angle p · scale / period[i].
    Holds no parameters; the array of periods stands outside the module tree.

    On a CPU one position alone is rotated by a product with its rotation matrix, which is kept for
    the next call: MLX computes `mx.fast.rope` there in some fifteen small operations, and a token
    needs it twice a layer. The layers of a network share one embedding, so it is made once a token.

    Args:
        dims: rotated features of a head.
        base: `rope_theta`; period[i] = base ** (2 i / dims).
        max_positions: positions beyond this raise.
        scaling: the config's `rope_scaling`: none, `linear`, or `llama3`.
        backwards: rotate by the negative of the angle, as nanochat's weights expect.
    """

    def __init__(
        self,
        dims: int,
        base: float,
        max_positions: int,
        scaling: Mapping[str, object] | None,
        backwards: bool = False,
    ):
        self.dims, self.max_positions = dims, max_positions
        self.periods, scale = rope_periods(dims, base, scaling)
        self.scale = -scale if backwards else scale
        mx.eval(self.periods)  # a lazy array belongs to the thread that made it
        self._kept: tuple[int, mx.array] | None = None  # a position and its rotation (D, D)

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        """Rotate x (B, H, T, D) as the positions [offset : offset + T].

        Raises:
            WorkbenchError: the positions go beyond `max_positions`.
        """
        end = offset + x.shape[-2]
        if offset < 0 or end > self.max_positions:
            raise WorkbenchError(
                f"positions [{offset} : {end}] are outside this model's {self.max_positions}",
                cure="Shorten the input, or generate fewer tokens.",
            )
        if x.shape[-2] == 1 and x.dtype == mx.float32 and self.dims == x.shape[-1] and not on_gpu():
            return x @ self._rotation(offset)
        return self._rotate(x, offset)

    def _rotate(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x,
            self.dims,
            traditional=False,
            base=None,
            scale=self.scale,
            offset=offset,
            freqs=self.periods,
        )

    def _rotation(self, position: int) -> mx.array:
        """Matrix (D, D): x @ it rotates x as this position. Row i is the rotated unit vector i."""
        if self._kept is None or self._kept[0] != position:
            rotation = self._rotate(mx.eye(self.dims)[:, None], position)[:, 0]
            mx.eval(rotation)
            self._kept = position, rotation
        return self._kept[1]


def rope_periods(
    dims: int, base: float, scaling: Mapping[str, object] | None
) -> tuple[mx.array, float]:
    """Periods (dims / 2,) and the factor on positions for a config's `rope_scaling`.

    `llama3` follows Meta's reference (Llama 3.1 model card; transformers'
    `_compute_llama3_parameters`): long wavelengths are stretched by `factor`, short ones kept,
    those between interpolated.

    Raises:
        ConfigError: an unknown kind of scaling, or one of its numbers is missing.
    """
    periods = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    kind, scaling = rope_kind(scaling), scaling or {}
    if kind == "default":
        return periods, 1.0
    if kind == "linear":
        return periods, 1.0 / _scaling_number(scaling, "factor")
    if kind == "llama3":
        return _llama3_periods(periods, scaling), 1.0
    raise ConfigError(
        f"rope scaling {kind!r} is not supported",
        where="config.json: rope_scaling",
        cure="Supported are: default, linear, llama3.",
    )


def rope_kind(scaling: Mapping[str, object] | None) -> object:
    """The name of a config's `rope_scaling`, "default" if it stretches nothing."""
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    return "default" if kind is None else kind


def _llama3_periods(periods: mx.array, scaling: Mapping[str, object]) -> mx.array:
    factor = _scaling_number(scaling, "factor")
    low = _scaling_number(scaling, "low_freq_factor")
    high = _scaling_number(scaling, "high_freq_factor")
    context = _scaling_number(scaling, "original_max_position_embeddings")
    if not low < high:
        raise ConfigError(
            f"low_freq_factor {low} must be below high_freq_factor {high}",
            where="config.json: rope_scaling",
        )
    rotations = context / (2 * math.pi * periods)  # full turns within the original context
    smooth = mx.clip((rotations - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / (factor * periods) + smooth / periods)


def _scaling_number(scaling: Mapping[str, object], key: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(
            f"{key} must be a positive number, got {value!r}",
            where="config.json: rope_scaling",
        )
    return float(value)
