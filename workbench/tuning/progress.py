"""What a run knows of itself beside its tensors: best validation, bad steps, spikes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SPIKE_WINDOW = 32  # losses that a new one is compared with
SPIKE_FACTOR = 6.0  # robust standard deviations above their median
SMALLEST_SPREAD = 0.02  # of the median: a loss that hardly varies has no spikes below


@dataclass
class Progress:
    """Counters that a checkpoint keeps."""

    best_loss: float | None = None  # smallest validation cross-entropy
    best_step: int | None = None  # at which it was seen
    without_improvement: int = 0  # validations since then
    bad_steps: int = 0  # that were skipped

    def note_validation(self, step: int, loss: float) -> bool:
        """Take in a validation; returns whether it is the best so far. NaN never is."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.without_improvement = loss, step, 0
            return True
        self.without_improvement += 1
        return False


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss stands far above the last ones: six robust standard deviations.

    The median absolute deviation, times 1.4826, estimates the standard deviation without being
    moved by earlier spikes (Rousseeuw and Croux 1993, section 1).
    """
    window = [value for value in before[-SPIKE_WINDOW:] if math.isfinite(value)]
    if len(window) < SPIKE_WINDOW // 2 or not math.isfinite(loss):
        return False
    middle = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in window)
    return loss > middle + SPIKE_FACTOR * max(spread, SMALLEST_SPREAD * abs(middle))
