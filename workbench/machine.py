"""How much memory this machine has, and how much a process may still take."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 16 << 20
UNLIMITED = 1 << 60  # version 1 writes a huge number where there is no limit
RUSAGE_V0_BYTES = 96  # struct rusage_info_v0: a UUID of 16 bytes and ten 64-bit counters
FOOTPRINT_AT = 16 + 7 * 8  # ri_phys_footprint in it


@dataclass(frozen=True)
class MachineMemory:
    """Memory of the machine, or of the container that this process runs in."""

    total_bytes: int
    available_bytes: int  # could be given to processes without swapping


def machine_memory() -> MachineMemory | None:
    """The machine's memory; in a Linux container with a limit, the container's.

    None where the system does not tell.
    """
    try:
        memory = psutil.virtual_memory()
    except (psutil.Error, OSError, RuntimeError):
        return None
    whole = MachineMemory(memory.total, memory.available)
    container = _container_memory(CGROUP)
    if container is None or container.total_bytes >= whole.total_bytes:
        return whole
    available = min(whole.available_bytes, container.available_bytes)
    return MachineMemory(container.total_bytes, available)


def process_memory(pid: int | None = None) -> int | None:
    """Bytes that a process holds in memory; None where the system does not tell.

    Args:
        pid: of the process; None: this one.

    The resident set; on macOS the physical footprint, which also counts what the GPU holds and
    what is compressed. A machine swaps by this figure.
    """
    try:
        if sys.platform == "darwin":
            return _footprint(psutil.Process(pid))
        return psutil.Process(pid).memory_info().rss
    except (psutil.Error, OSError, AttributeError):
        return None


def return_freed_memory() -> None:
    """Have the C library hand freed pages back to the system; does nothing but on Linux's glibc.

    glibc keeps what is freed for later, so that a process holds memory that nobody uses.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """Have large blocks mapped one by one, so that they leave the process when they are freed.

    glibc would move its threshold up to 32 MB by itself. Blocks of the logits' size then lie in
    the heap among smaller ones and leave holes: a training that needs 1.9 GB held 5.8 GB.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def _footprint(process: psutil.Process) -> int:
    """`ri_phys_footprint` of proc_pid_rusage (libproc.h), the figure of Activity Monitor."""
    buffer = ctypes.create_string_buffer(RUSAGE_V0_BYTES)
    if ctypes.CDLL(None).proc_pid_rusage(process.pid, 0, buffer):
        return process.memory_info().rss
    return ctypes.c_uint64.from_buffer(buffer, FOOTPRINT_AT).value


def _container_memory(root: Path) -> MachineMemory | None:
    """Limit and room of a control group, version 2 or 1; file pages can be given back."""
    for limit, used, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            total = int((root / limit).read_text())  # "max": no limit, no number
            taken = int((root / used).read_text())
            lines = (root / limit).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        if 0 < total < UNLIMITED:
            stat = dict(line.split(maxsplit=1) for line in lines if " " in line)
            held = taken - int(stat.get(inactive, 0))
            return MachineMemory(total, max(0, total - held))
    return None
