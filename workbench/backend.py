"""What this machine is, and what MLX reaches on it."""

from __future__ import annotations

import html
import importlib.metadata
import os
import platform
import statistics
import time
from dataclasses import dataclass

import mlx.core as mx

from workbench.blas import Blas, load_blas
from workbench.machine import machine_memory

REPORTED_PACKAGES = ("mlx", "mlx-lm", "safetensors", "transformers", "jupyterlab", "papermill")
CPU_CACHE_BYTES = 250_000_000
MATMUL_SIZE = 1024  # rows and columns of the measured product


@dataclass(frozen=True, repr=False)
class Backend:
    """Device, BLAS, measured speed, memory and versions; shows itself as text and as HTML."""

    device: str
    blas: Blas
    float32_gflops: float  # measured, 1024 × 1024 × 1024
    cores: int
    total_bytes: int | None  # memory of the machine, or of the container; None: not known
    available_bytes: int | None
    versions: dict[str, str]

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs, in the order in which they are shown."""
        blas = f"{self.blas.name} ({self.blas.source})"
        memory = "not known"
        if self.total_bytes is not None:
            memory = f"{self.available_bytes / 1e9:.1f} GB free of {self.total_bytes / 1e9:.1f} GB"
        rows = [
            ("device", f"{self.device}, {self.cores} cores"),
            ("BLAS", blas),
            ("float32 matmul", f"{self.float32_gflops:.0f} GFLOP/s measured"),
            ("memory", memory),
            ("versions", ", ".join(f"{name} {v}" for name, v in self.versions.items())),
        ]
        return [*rows, ("warning", self.blas.warning)] if self.blas.warning else rows

    def __str__(self) -> str:
        return "\n".join(f"{what:<15} {value}" for what, value in self.rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(what)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for what, value in self.rows()
        )
        return f"<table>{cells}</table>"


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA) by default."""
    return mx.default_device().type == mx.gpu


def default_dtype() -> mx.Dtype | None:
    """float32 on a CPU, where only float32 products use the BLAS; None (the file's) on a GPU."""
    return None if on_gpu() else mx.float32


def default_cache_limit(large_bytes: int = 0) -> int:
    """Bytes MLX may keep for reuse between steps: a third of the memory, on a CPU less.

    There, 250 MB trained SmolLM2's adapter as fast as 2 GB did. Large blocks that are not kept must
    be mapped anew, which made a step of its head 1.4 times as long: an update makes three of them.
    On a GPU this was not measured.

    Args:
        large_bytes: of what trains, in arrays of `machine.LARGE_BLOCK_BYTES` and more.
    """
    memory, wanted = machine_memory(), cpu_cache_bytes(large_bytes)
    if memory is None:
        return wanted
    return memory.total_bytes // 3 if on_gpu() else min(wanted, memory.total_bytes // 3)


def cpu_cache_bytes(large_bytes: int) -> int:
    """`default_cache_limit` of a CPU with memory enough."""
    return CPU_CACHE_BYTES + 3 * large_bytes  # new parameter, first and second moment


def measure_matmul(size: int = MATMUL_SIZE, seconds: float = 0.3) -> float:
    """Float32 matrix product speed in GFLOP/s: the median of the runs that fit into `seconds`."""
    a, b = mx.random.normal((2, size, size), key=mx.random.key(0))
    mx.eval(a, b, a @ b)
    durations: list[float] = []
    while not durations or sum(durations) < seconds:
        start = time.perf_counter()
        mx.eval(a @ b)
        durations.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(durations) / 1e9


def describe_backend() -> Backend:
    """Measure and describe the machine that MLX runs on; takes about half a second."""
    memory = machine_memory()
    versions = {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}
    return Backend(
        device=_device_name(),
        blas=load_blas(),
        float32_gflops=measure_matmul(),
        cores=usable_cores(),
        total_bytes=memory.total_bytes if memory else None,
        available_bytes=memory.available_bytes if memory else None,
        versions={"python": platform.python_version(), **versions},
    )


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device_name() -> str:
    kind = "GPU" if on_gpu() else "CPU"
    name = str(mx.device_info().get("device_name", "")) or platform.processor()
    return f"{kind} {name or platform.machine()}"
