"""What MLX and the process hold, in bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from workbench.backend import default_cache_limit
from workbench.machine import machine_memory, process_memory, return_freed_memory

MEGA = 1e6


@dataclass(frozen=True)
class MemoryReading:
    """One moment's memory.

    The peak covers arrays in use only; the allocator's cache comes on top, and neither shows what
    else the process holds. A machine swaps by the process figure.
    """

    active_bytes: int  # arrays in use
    cache_bytes: int  # freed, kept by MLX's allocator for reuse
    peak_bytes: int  # largest active_bytes since the last reset
    process_bytes: int | None = None  # resident set; on macOS the footprint; None: not known
    available_bytes: int | None = None  # what the machine could still give without swapping


class _Peak:
    """The largest peak of the phases that have reset MLX's own counter on the way."""

    carried = 0


def read_memory() -> MemoryReading:
    """Read MLX's counters, the process's memory and the machine's; takes about 0.2 ms."""
    machine = machine_memory()
    return MemoryReading(
        active_bytes=mx.get_active_memory(),
        cache_bytes=mx.get_cache_memory(),
        peak_bytes=max(mx.get_peak_memory(), _Peak.carried),
        process_bytes=process_memory(),
        available_bytes=machine.available_bytes if machine else None,
    )


def reset_peak() -> None:
    """Let `peak_bytes` begin anew."""
    _Peak.carried = 0
    mx.reset_peak_memory()


def release_memory() -> None:
    """Empty MLX's cache, and hand what was freed back to the system.

    Emptying the cache alone leaves the process as large as it was where the C library keeps freed
    pages. Takes some 50 ms, and the next step must ask for its memory anew.
    """
    mx.clear_cache()
    return_freed_memory()


@contextlib.contextmanager
def cache_limit(limit: int | None) -> Iterator[None]:
    """Bound what MLX's allocator keeps for reuse; the old bound comes back afterwards.

    Args:
        limit: bytes; None for `default_cache_limit()`.
    """
    previous = mx.set_cache_limit(default_cache_limit() if limit is None else limit)
    try:
        yield
    finally:
        mx.set_cache_limit(previous)


@dataclass
class PhaseReading:
    """What one phase of the work did to the memory; filled when the phase ends."""

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0  # largest active_bytes within the phase
    before: MemoryReading | None = None
    after: MemoryReading | None = None

    @property
    def kept_bytes(self) -> int:
        """Arrays that are in use after the phase and were not before it."""
        return self.after.active_bytes - self.before.active_bytes

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.seconds:.3f} s, peak {self.peak_bytes / MEGA:.1f} MB, "
            f"kept {self.kept_bytes / MEGA:+.1f} MB"
        )


@contextlib.contextmanager
def memory_phase(name: str) -> Iterator[PhaseReading]:
    """Measure a phase: load, forward, backward, update, validation, …

    MLX computes lazily: what the phase is to be charged with must be evaluated in it. Phases may
    stand inside each other; `read_memory().peak_bytes` goes on as if there were none.
    """
    reading, started = PhaseReading(name, before=read_memory()), time.perf_counter()
    reset_peak()
    try:
        yield reading
    finally:
        reading.seconds = time.perf_counter() - started
        # MLX counts a peak from the next allocation on: what was there already counts, too.
        reading.peak_bytes = max(read_memory().peak_bytes, reading.before.active_bytes)
        _Peak.carried = max(reading.before.peak_bytes, reading.peak_bytes)
        reading.after = read_memory()
