"""Stop before the machine swaps: two limits on what the process holds."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import check_whole
from workbench.probes.memory import MemoryReading

SHARE = 0.95  # of what the machine can give this process: the limit, if none is set
WARNING_SHARE = 0.8  # of the limit: from here on a warning, and the cache is emptied
GIGA = 1e9

FINE, TIGHT, OVER = "fine", "tight", "over"


@dataclass(frozen=True)
class MemoryGuard:
    """Judges a reading: fine, tight (above 80 % of the limit) or over the limit.

    Without a limit of its own, the guard takes 95 % of what the process holds and the machine
    could still give it without swapping, at each reading anew: other programs come and go.

    Args:
        limit_bytes: process memory that must not be passed; None: from the machine; 0: no guard.

    Raises:
        ConfigError: the limit is not a whole number from 0.
    """

    limit_bytes: int | None = None

    def __post_init__(self):
        if self.limit_bytes is not None:
            check_whole("limit_bytes", self.limit_bytes, 0)

    def limit(self, reading: MemoryReading) -> int | None:
        """Process memory at which training should stop; None: no guard, or nothing is known."""
        if self.limit_bytes is not None:
            return self.limit_bytes or None
        if reading.process_bytes is None or reading.available_bytes is None:
            return None
        return int(SHARE * (reading.process_bytes + reading.available_bytes))

    def verdict(self, reading: MemoryReading) -> str:
        """ "fine", "tight" or "over"; fine, too, where a counter is missing."""
        limit = self.limit(reading)
        if limit is None or reading.process_bytes is None:
            return FINE
        if reading.process_bytes >= limit:
            return OVER
        return TIGHT if reading.process_bytes >= WARNING_SHARE * limit else FINE

    def explain(self, reading: MemoryReading) -> str:
        """The numbers behind a verdict, in words."""
        limit = self.limit(reading)
        if limit is None or reading.process_bytes is None:
            return "the process's memory or the machine's is not known"
        source = "the machine's memory" if self.limit_bytes is None else "memory_limit_bytes"
        return (
            f"the process holds {reading.process_bytes / GIGA:.1f} GB, "
            f"{reading.process_bytes / limit:.0%} of the limit of {limit / GIGA:.1f} GB "
            f"(from {source})"
        )
