"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from workbench.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine", "polynomial", "wsd")


def learning_rate_at(
    step: int,
    *,
    schedule: str,
    peak: float,
    floor: float,
    warmup_steps: int,
    total_steps: int,
    power: float = 1.0,
    decay_steps: int | None = None,
    warmup_from: float | None = None,
) -> float:
    """Learning rate of a step, counted from 0.

    Linear warm-up: peak · (step + 1) / warmup_steps, so that the first step already moves, or from
    `warmup_from`. Then constant, or down towards the floor: in a straight line, along a half
    cosine (Loshchilov and Hutter 2017, SGDR, equation 5), as (1 - progress) ** power, or, for
    `wsd` (Hu et al. 2024, MiniCPM, section 4), constant until the last `decay_steps`, then
    straight down. The floor is what a step after the last would have: no step is spent in vain.

    Args:
        schedule, peak, floor: one of `SCHEDULES`; the largest rate, and that at the end.
        warmup_steps, total_steps: updates before the peak, and in all.
        power: of `polynomial`.
        decay_steps: updates that come down, after the warm-up (None: all), or for `wsd` the last
            ones (None: a tenth).
        warmup_from: rate of the first update, the peak at most.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}", cure=f"Use one of {SCHEDULES}.")
    if step < warmup_steps:
        return _warming(step, peak, warmup_steps, warmup_from)
    start, length = warmup_steps, decay_steps or total_steps - warmup_steps
    if schedule == "wsd":
        start = max(start, total_steps - (decay_steps or max(1, total_steps // 10)))
        length = total_steps - start
    if schedule == "constant":
        return peak
    progress = min(1.0, max(0, step - start) / max(1, length))
    return floor + (peak - floor) * _share_left(progress, schedule, power)


def _share_left(progress: float, schedule: str, power: float) -> float:
    """Of the way from the peak to the floor, in [0, 1]."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return (1 - progress) ** (power if schedule == "polynomial" else 1)


def _warming(step: int, peak: float, warmup_steps: int, first: float | None) -> float:
    if first is None:
        return peak * (step + 1) / warmup_steps
    first = min(first, peak)
    return first + (peak - first) * step / max(1, warmup_steps - 1)
