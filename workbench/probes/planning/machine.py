"""A machine to plan for: this one, or one that is described."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import mlx.core as mx

from workbench.backend import cpu_cache_bytes, on_gpu
from workbench.errors import ConfigError, check_whole
from workbench.machine import machine_memory, process_memory

USABLE = 0.75  # of a described machine's memory; the rest is left to the system and other programs


@dataclass(frozen=True)
class Machine:
    """Memory and device of a machine.

    Raises:
        ConfigError: no memory, or more available than there is.
    """

    name: str
    total_bytes: int
    available_bytes: int | None = None  # that a run may take; None: three quarters of the total
    gpu: bool = False  # MLX computes on a GPU (Metal or CUDA)
    unified: bool = True  # the GPU, if any, uses the same memory as the CPU
    linux: bool = True  # where our networks have forms of their own for MLX's CPU backend

    def __post_init__(self):
        check_whole(f"total_bytes of {self.name}", self.total_bytes, 1)
        if self.available_bytes is not None:
            check_whole(f"available_bytes of {self.name}", self.available_bytes, 1)
            if self.available_bytes > self.total_bytes:
                raise ConfigError(
                    f"{self.name} cannot have {self.available_bytes} bytes available "
                    f"of {self.total_bytes}"
                )

    @classmethod
    def here(cls) -> Machine:
        """This machine, or container, as it is now; what this process holds counts as available.

        Raises:
            ConfigError: the system does not tell.
        """
        memory, gpu = machine_memory(), on_gpu()
        if memory is None:
            raise ConfigError(
                "this machine does not tell how much memory it has",
                cure="Describe it: Machine(name, total_bytes).",
            )
        total = memory.total_bytes
        available = min(total, memory.available_bytes + (process_memory() or 0))
        limit = mx.device_info().get("max_recommended_working_set_size") if gpu else None
        if isinstance(limit, int) and limit > 0:
            available = min(available, limit)
        name = f"this machine ({platform.system()}, {'GPU' if gpu else 'CPU'})"
        unified = not gpu or platform.system() == "Darwin"
        linux = platform.system() == "Linux"
        return cls(name, total, available, gpu, unified, linux)

    @property
    def budget_bytes(self) -> int:
        """What a run may take."""
        if self.available_bytes is not None:
            return self.available_bytes
        return int(USABLE * self.total_bytes)

    def cache_limit_bytes(self, large_bytes: int) -> int:
        """The trainer's default bound on the allocator's cache; see `default_cache_limit`."""
        third = self.total_bytes // 3
        return third if self.gpu else min(cpu_cache_bytes(large_bytes), third)

    @property
    def process_on_device(self) -> bool:
        """Whether the Python process takes from the same memory as the arrays."""
        return self.unified or not self.gpu
