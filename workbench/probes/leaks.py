"""Does memory grow with every step, and how fast?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.errors import ConfigError, check_number, check_whole

WARMUP_STEPS = 10  # the allocator fills its cache, the process its pools
SMALLEST = 8  # readings that tell a slope from noise
HARMLESS = 100_000.0  # bytes a step: a thousand steps then grow by 100 MB
MEGA = 1e6

LEAKING, FLAT, UNDECIDED = "leaking", "flat", "undecided"


@dataclass(frozen=True)
class LeakReport:
    """The slope of a memory curve after its warm-up, with a confidence interval."""

    verdict: str  # "leaking", "flat" or "undecided"
    slope: float  # bytes a step
    low: float  # bounds of the confidence interval, bytes a step
    high: float
    baseline_bytes: float  # at the end of the warm-up
    num_steps: int  # readings after the warm-up
    harmless: float  # bytes a step that are no leak

    def steps_until(self, limit_bytes: float) -> float:
        """Steps from the last reading until a limit is reached, at this slope; infinite if flat."""
        now = self.baseline_bytes + self.slope * self.num_steps
        if self.verdict == FLAT or self.slope <= 0:
            return math.inf
        return max(0.0, (limit_bytes - now) / self.slope)

    def __str__(self) -> str:
        slope, low, high = (
            f"{round(rate / MEGA, 3) + 0.0:+.3f}" for rate in (self.slope, self.low, self.high)
        )  # + 0.0: no minus before a zero
        return f"{self.verdict}: {slope} MB a step ({low} to {high}) over {self.num_steps} steps"


def find_leak(
    readings: Sequence[float],
    warmup_steps: int = WARMUP_STEPS,
    harmless: float = HARMLESS,
    confidence: float = 0.95,
) -> LeakReport:
    """Fit a line to the readings after the warm-up, and judge its slope.

    Least squares; neighbouring readings are alike, so the interval uses the effective number of
    independent ones, n (1 - r) / (1 + r) with r their lag-1 correlation (Santer et al. 2000,
    Journal of Geophysical Research 105, equation 6).

    Args:
        readings: bytes, one a step, such as `[r.active_bytes for r in trainer.reports]`.
        warmup_steps: readings at the start that are left out.
        harmless: bytes a step up to which growth is no leak.
        confidence: of the interval, in (0, 1).

    Returns:
        "leaking" if the whole interval is above `harmless`, "flat" if it is below, else
        "undecided": more steps will tell.

    Raises:
        ConfigError: a setting is out of range, or too few readings are left.
    """
    check_number("harmless", harmless, 0)
    check_number("confidence", confidence, 0)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence!r}")
    values = _after_warmup(readings, warmup_steps)
    slope, error = _line(values)
    reach = statistics.NormalDist().inv_cdf(0.5 + confidence / 2) * error
    low, high = slope - reach, slope + reach
    verdict = LEAKING if low > harmless else FLAT if high <= harmless else UNDECIDED
    baseline = float(values.mean() - slope * (len(values) - 1) / 2)
    return LeakReport(verdict, slope, low, high, baseline, len(values), harmless)


def _after_warmup(readings: Sequence[float], warmup_steps: int) -> np.ndarray:
    check_whole("warmup_steps", warmup_steps, 0)
    values = np.asarray(readings, dtype=np.float64)[warmup_steps:]
    if values.ndim != 1 or len(values) < SMALLEST or not np.isfinite(values).all():
        raise ConfigError(
            f"{len(values)} finite readings after {warmup_steps} of warm-up are too few",
            cure=f"Give at least {warmup_steps + SMALLEST}, one a step.",
        )
    return values


def _line(values: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    spread = float((steps**2).sum())
    slope = float((steps * values).sum() / spread)
    rest = values - values.mean() - slope * steps
    variance = float((rest**2).sum())
    if variance == 0:
        return slope, 0.0
    alike = float((rest[1:] * rest[:-1]).sum()) / variance
    effective = len(values) * (1 - alike) / (1 + alike) if alike > 0 else len(values)
    freedom = max(1.0, effective - 2)
    return slope, math.sqrt(variance / freedom / spread)
