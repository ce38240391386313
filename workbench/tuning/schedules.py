"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from workbench.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_at(
    step: int,
    *,
    schedule: str,
    peak: float,
    floor: float,
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Learning rate of a step, counted from 0.

    Linear warm-up: peak · (step + 1) / warmup_steps, so that the first step already moves. Then
    constant, or from the peak down towards the floor in a straight line or along a half cosine
    (Loshchilov and Hutter 2017, SGDR, equation 5). The floor is what a step after the last would
    have: with a floor of zero, no step is spent in vain.

    Args:
        schedule: `constant`, `linear` or `cosine`.
        peak: the largest rate.
        floor: the rate at the end, for `linear` and `cosine`.
        warmup_steps: updates before the peak.
        total_steps: updates in all.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}", cure=f"Use one of {SCHEDULES}.")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
