"""How sure a share of a few answers is."""

from __future__ import annotations

import math

Z = 1.959963984540054  # normal quantile of a two-sided 95 % interval


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, Journal of the American Statistical Association 22).

    Also of a mean of scores in [0, 1]: their variance is at most that of zeros and ones with the
    same mean, so that the interval is then rather too wide than too narrow.

    Args:
        mean: of the scores, in [0, 1].
        count: of the scores, from 1.
    """
    scale = 1 + Z * Z / count
    centre = (mean + Z * Z / (2 * count)) / scale
    margin = Z / scale * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - margin), min(1.0, centre + margin)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of as uneven a split by chance (exact binomial, ties left out).

    For right and wrong answers it is McNemar's exact test.
    """
    changed, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(changed, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)
