"""Rotary position embedding, and how checkpoints stretch it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx

from workbench.errors import ConfigError, WorkbenchError


class RotaryEmbedding:
    """Rotary position embedding in the half-split layout (Su et al. 2021, RoFormer, section 3.4).

    Rotates the pairs (x[i], x[i + dims / 2]) at position p by the angle p · scale / period[i].
    Holds no parameters; the array of periods stands outside the module tree.

    Args:
        dims: rotated features of a head.
        base: `rope_theta`; period[i] = base ** (2 i / dims).
        max_positions: positions beyond this raise.
        scaling: the config's `rope_scaling`: none, `linear`, or `llama3`.
    """

    def __init__(
        self, dims: int, base: float, max_positions: int, scaling: Mapping[str, object] | None
    ):
        self.dims, self.max_positions = dims, max_positions
        self.periods, self.scale = rope_periods(dims, base, scaling)
        mx.eval(self.periods)  # a lazy array belongs to the thread that made it

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
        return mx.fast.rope(
            x,
            self.dims,
            traditional=False,
            base=None,
            scale=self.scale,
            offset=offset,
            freqs=self.periods,
        )


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
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", None):
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
