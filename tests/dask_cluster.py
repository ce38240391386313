"""A scheduler and workers of dask.distributed as processes of their own, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from tests.process import ROOT

T = TypeVar("T")
WORKER = ("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
MLX = ("--resources", "mlx=1")


class DaskCluster:
    """Processes of the command `dask`; none of them outlives the context."""

    def __init__(self, folder: Path, *security: str, **env: str):
        self.folder, self.security = folder, security
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self._start(
            "scheduler",
            "--port",
            "0",
            "--no-dashboard",
            "--host",
            "127.0.0.1",
            "--scheduler-file",
            str(folder / "scheduler.json"),
            **env,
        )
        self.address = wait_for(self._address)

    def workers(
        self, number: int, *options: str, before: Sequence[str] = (), **env: str
    ) -> list[subprocess.Popen]:
        """Start workers, and wait until the scheduler knows them."""
        started = [
            self._start(*WORKER, *options, self.address, before=before, **env)
            for _ in range(number)
        ]
        for process in started:
            wait_for(partial(self.has_joined, process))
        return started

    def has_joined(self, worker: subprocess.Popen) -> bool:
        """Whether the scheduler knows a worker."""
        log = (self.folder / f"{self.processes.index(worker)}.log").read_text()
        assert worker.poll() is None, log
        return "Registered to" in log

    def _start(self, *options: str, before: Sequence[str] = (), **env: str) -> subprocess.Popen:
        with (self.folder / f"{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", "dask", *options, *self.security],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": paths(), **env},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def _address(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "scheduler.json").read_text())["address"]
        return ""

    def kill_one_of(self, processes: Sequence[int]) -> None:
        """Kill the worker that is among these process ids; it may be dead already."""
        (worker,) = [each for each in self.processes if each.pid in processes]
        worker.kill()

    def __enter__(self) -> DaskCluster:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], T], seconds: float = 120.0) -> T:
    """What a condition gives, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


def paths() -> str:
    """Our modules first, whatever folder a worker starts in."""
    return os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
