"""What MLX and the process hold, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import psutil


@dataclass(frozen=True)
class MemoryReading:
    """One moment's memory.

    The peak covers arrays in use only; the allocator's cache comes on top, and neither shows what
    else the process holds. A machine swaps by the process figure.
    """

    active_bytes: int  # arrays in use
    cache_bytes: int  # freed, kept by MLX's allocator for reuse
    peak_bytes: int  # largest active_bytes since the last reset
    process_bytes: int  # resident set size


def read_memory() -> MemoryReading:
    """Read MLX's counters and the process's resident set; takes some tens of microseconds."""
    return MemoryReading(
        active_bytes=mx.get_active_memory(),
        cache_bytes=mx.get_cache_memory(),
        peak_bytes=mx.get_peak_memory(),
        process_bytes=psutil.Process().memory_info().rss,
    )
