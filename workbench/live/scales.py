"""Axes that keep still: limits and ticks at round numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from workbench.tuning.config import StepReport

FIRM = 60  # steps up to which the axis shows the whole run from the start
ROUND = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)


def round_up(value: float) -> float:
    """The next round number from a positive one on."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next((step for step in ROUND if step * power >= value), 10)


def round_down(value: float) -> float:
    """The last round number up to a positive one."""
    power = 10.0 ** math.floor(math.log10(value))
    return power * max((step for step in ROUND if step * power <= value), default=1)


def shown_steps(last: StepReport | None) -> int:
    """The right end of the axis: the whole run, or, early in a long one, some steps ahead."""
    if last is None:
        return FIRM
    done, total = last.step, last.total_steps
    if total <= max(FIRM, 4 * done):
        return max(2, total)
    return next(end for end in _windows() if end >= 1.5 * done)


def _windows() -> Iterator[int]:
    """50, 100, 200, 500, …"""
    for power in itertools.count(1):
        yield from (step * 10**power for step in (5, 10, 20))


def log_ticks(low: float, high: float) -> list[float]:
    """Few round numbers between two limits."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in decades for step in steps]
        ticks = [tick for tick in ticks if 0.999 * low <= tick <= 1.001 * high]
        if len(ticks) <= 6:
            break
    return ticks


def short_label(value: float, place: int) -> str:
    """A tick in few characters, for `FuncFormatter`: 0.25, 500, 15k, 2M, 3G, 5e15, 3e-4."""
    if abs(value) >= 1e9:
        giga = f"{value / 1e9:.3g}G"
        return giga if abs(value) < 1e12 else f"{value:.3g}".replace("e+", "e")
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.4g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
