"""What adding up over ranks costs, and what that lets one expect of more machines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import pandas as pd

from workbench.errors import ConfigError, check_number, check_whole
from workbench.tuning.ranks import Ranks

SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000)  # bytes
REPEATS = 5
FLOAT_BYTES = 4


def measure_all_reduce(
    ranks: Ranks, sizes: Sequence[int] = SIZES, repeats: int = REPEATS
) -> pd.DataFrame:
    """How long it takes to add up float32 messages over the ranks; all must call it.

    `bytes_per_second` is what a rank sends: 2 (N − 1) / N of the message.

    Args:
        ranks: two at least.
        sizes: of the messages, in bytes.
        repeats: of each; the median counts.

    Returns:
        A table: message_bytes, seconds, bytes_per_second.

    Raises:
        ConfigError: there is one rank only, or a size is below 4 bytes.
    """
    if ranks.alone:
        raise ConfigError(
            "one process adds nothing up", cure="Start two: python -m workbench launch -n 2 …"
        )
    check_whole("repeats", repeats, 1)
    rows = []
    for size in sizes:
        check_whole("a message's size", size, FLOAT_BYTES)
        message = mx.zeros(size // FLOAT_BYTES)
        seconds = []
        for _ in range(repeats + 1):
            ranks.gather("measuring", None)  # begin at the same time
            started = time.perf_counter()
            ranks.add_up([message])
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[1:])
        sent = 2 * (ranks.size - 1) / ranks.size * message.nbytes
        rows.append((message.nbytes, median, sent / median))
    return pd.DataFrame(rows, columns=["message_bytes", "seconds", "bytes_per_second"])


@dataclass(frozen=True)
class Scaling:
    """What is expected of a number of ranks."""

    ranks: int
    compute_seconds: float  # of a step, on each
    exchange_seconds: float  # of a step, for adding up
    speedup: float  # over one rank

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return self.compute_seconds + self.exchange_seconds

    @property
    def efficiency(self) -> float:
        """Share of the ranks' work that goes into the step, from 0 to 1."""
        return self.speedup / self.ranks


def predict_scaling(
    step_seconds: float, message_bytes: float, bandwidth: float, latency: float, ranks: int
) -> Scaling:
    """Time of a step that N equal machines share, in a ring.

    compute / N + 2 (N − 1) / N · bytes / bandwidth + 2 (N − 1) · latency (Patarasuk and Yuan 2009,
    Bandwidth optimal all-reduce algorithms, section 3). Nothing is sent while it is computed, and
    no machine waits for a slower one: the most that can be had.

    Args:
        step_seconds: of one machine for the whole step.
        message_bytes: of what trains, in its dtype.
        bandwidth: of a link, in bytes a second.
        latency: of a message between neighbours, in seconds.
        ranks: N.

    Raises:
        ConfigError: a number is out of range.
    """
    values = {"step_seconds": step_seconds, "message_bytes": message_bytes, "latency": latency}
    for name, value in values.items():
        check_number(name, value, 0)
    check_number("bandwidth", bandwidth, 1)
    check_whole("ranks", ranks, 1)
    if not step_seconds:
        raise ConfigError("step_seconds must be above 0")
    hops = 2 * (ranks - 1)
    exchange = hops / ranks * message_bytes / bandwidth + hops * latency
    compute = step_seconds / ranks
    return Scaling(ranks, compute, exchange, step_seconds / (compute + exchange))
