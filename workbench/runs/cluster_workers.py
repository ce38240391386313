"""What dask.distributed's workers do for a sweep: show themselves, and make attempts at jobs.

`cluster.py` and `cluster_connection.py` send these functions there. Two of them travel by value,
as nested functions do, with their imports inside: where they are opened, there may be no workbench,
and loading it takes seconds.
"""

from __future__ import annotations

import dataclasses
import pickle
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from workbench.backend import usable_cores
from workbench.runs.jobs import CANCELLED, Job, JobResult, run_job

ASK_SECONDS = 1.0  # between two questions to the scheduler whether the sweep was cancelled


@dataclass(frozen=True)
class Surroundings:
    """What a process has, as far as a sweep depends on it."""

    version: str  # of the workbench, by its code, and of MLX: `3f2a91c0, MLX 0.32.4`; or empty
    machine: str  # the host's name
    token: str  # what the marker file holds; empty where it cannot be read
    writable: bool  # whether the marker's folder is


def make_look() -> Callable[[str], dict[str, object]]:
    """A function from the marker, a file in the sweep's folder, to the fields of Surroundings."""

    def look(marker: str):
        import hashlib
        import os
        import platform
        from importlib import metadata, util
        from pathlib import Path

        digest, version, token = hashlib.sha256(), "", ""
        if spec := util.find_spec("workbench"):
            package = Path(spec.origin).parent
            for path in sorted(package.rglob("*.py")):
                digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
            version = f"{digest.hexdigest()[:8]}, MLX {metadata.version('mlx')}"
        if os.path.isfile(marker) and os.access(marker, os.R_OK):
            token = Path(marker).read_bytes()[:64].decode("ascii", "replace")
        writable = os.access(os.path.dirname(marker), os.W_OK | os.X_OK)
        names = "version", "machine", "token", "writable"
        return dict(zip(names, (version, platform.node(), token, writable)))

    return look


def seal(
    job: Job, event: str, machines: Mapping[str, int] | None
) -> tuple[Callable[[bytes], object], bytes]:
    """A function and its argument, which run a job on a worker as `run_there` does.

    The scheduler opens what it passes on, but not these bytes.
    """

    def open_and_run(work: bytes):
        import pickle

        function, *arguments = pickle.loads(work)
        return function(*arguments)

    return open_and_run, pickle.dumps((run_there, job, event, machines))


def run_there(job: Job, event: str, machines: Mapping[str, int] | None) -> JobResult:
    """Make one attempt at a job; it ends when the sweep is cancelled or gone.

    Args:
        job: its paths are absolute.
        event: name of the distributed.Event that is set when the sweep is cancelled.
        machines: workers by machine, which share its cores; None: the job says how many threads.

    Raises:
        RunError: the folder cannot be written, or is in use.
    """
    unwanted = _Unwanted(event)
    if unwanted():
        return JobResult(CANCELLED, error="cancelled")
    if machines is not None:
        threads = max(1, usable_cores() // machines.get(platform.node(), 1))
        job = dataclasses.replace(job, threads=threads)
    return run_job(job, unwanted)


class _Unwanted:
    """Whether nobody waits for this task any more: asked often, it seldom asks the scheduler."""

    def __init__(self, event: str):
        from distributed import Event, get_client, get_worker

        self.worker = get_worker()
        self.key = self.worker.get_current_task()
        self.event = Event(event, client=get_client())
        self.asked = float("-inf")

    def __call__(self) -> bool:
        # The scheduler lets go of the tasks of a client that has gone, and a worker that has lost
        # its scheduler closes: neither of them sets the event.
        task = self.worker.state.tasks.get(self.key)
        running = self.worker.status.name in ("running", "paused", "closing_gracefully")
        if not running or task is None or task.state == "cancelled":
            return True
        if time.monotonic() - self.asked < ASK_SECONDS:
            return False
        self.asked = time.monotonic()
        try:
            return self.event.is_set()
        except Exception:  # of many kinds; a lost scheduler has nobody who wants the result
            return True
