"""Jobs on this machine, some at a time."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from workbench.errors import check_whole
from workbench.runs.jobs import Job, JobResult, run_job


class LocalExecutor:
    """Runs jobs here; each in a process of its own, which a thread waits for.

    Args:
        at_once: jobs that may run at the same time.
    """

    shares_memory = True

    def __init__(self, at_once: int = 1):
        check_whole("at_once", at_once, 1)
        self.at_once = at_once
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(at_once, "job")

    def submit(self, job: Job) -> Future[JobResult]:
        """Start a job."""
        return self._pool.submit(run_job, job, self._cancelled.is_set)

    def cancel(self) -> None:
        """End all that runs, kernels included."""
        self._cancelled.set()

    def close(self) -> None:
        """Wait for what runs, and let go of the threads."""
        self._pool.shutdown()
