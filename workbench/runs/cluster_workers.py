"""What dask.distributed's workers do for a sweep: show themselves, and make attempts at jobs.

These functions run in a worker's process; `cluster.py` sends them there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from workbench.runs.jobs import CANCELLED, Job, JobResult, run_job

PACKAGE = Path(__file__).resolve().parent.parent
ASK_SECONDS = 1.0  # between two questions to the scheduler whether the sweep was cancelled
MARKER_BYTES = 64


@dataclass(frozen=True)
class Surroundings:
    """What a worker has, as far as a sweep depends on it."""

    version: str  # digest of the workbench's code, and MLX's version
    machine: str  # the host's name
    token: str  # what the marker file holds; empty: not there
    writable: bool  # whether the marker's folder is


def look_around(marker: str) -> Surroundings:
    """Tell what this process sees.

    Args:
        marker: a file that the sweep's process has put into the folder that all must share.
    """
    try:
        with open(marker, encoding="ascii") as file:
            token = file.read(MARKER_BYTES)
    except (OSError, UnicodeDecodeError):
        token = ""
    writable = os.access(os.path.dirname(marker), os.W_OK | os.X_OK)
    return Surroundings(code_version(), platform.node(), token, writable)


def code_version() -> str:
    """What workbench this is, by its code: `3f2a91c0, MLX 0.32.4`."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode())
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()[:8]}, MLX {metadata.version('mlx')}"


def run_there(job: Job, event: str) -> JobResult:
    """Make one attempt at a job; it ends when the sweep is cancelled or gone.

    Args:
        job: its paths are absolute.
        event: name of the distributed.Event that is set when the sweep is cancelled.

    Raises:
        RunError: the folder cannot be written, or is in use.
    """
    unwanted = _Unwanted(event)
    if unwanted():
        return JobResult(CANCELLED, error="cancelled")
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
        except (
            Exception
        ):  # of many kinds: the scheduler is lost, and with it who would get a result
            return True
