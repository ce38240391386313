"""A sweep's jobs on the workers of a dask.distributed cluster: other processes, other machines.

Needs the extra `cluster`: `pip install 'mlx-lora-workbench[cluster]'`, on all machines the same
workbench, and a folder that they share under the same path. Then, one worker a machine:

    dask scheduler --port 8786
    dask worker tcp://scheduler:8786 --resources "mlx=1" --nthreads 1
    wb.sweep("train.ipynb", grid, root="/shared/sweep", executor="tcp://scheduler:8786")

`executor="dask"` starts workers on this machine (a script does so below `if __name__ ==
"__main__":`, since they import it); `executor=client` takes a `distributed.Client`.

Whoever reaches a scheduler can run code on its workers. Outside of a trusted network use TLS, with
certificates of an authority of your own for all three parties:

    dask scheduler --protocol tls --tls-ca-file ca.pem --tls-cert cert.pem --tls-key key.pem
    dask worker tls://scheduler:8786 --tls-ca-file ca.pem … --resources "mlx=1" --nthreads 1
    Security(tls_ca_file="ca.pem", tls_client_cert="cert.pem", tls_client_key="key.pem",
             require_encryption=True)   # distributed.security; Client("tls://…", security=…)

With an address in place of a client, dask reads the same from its configuration
(`DASK_DISTRIBUTED__COMM__TLS__CA_FILE`, `…TLS__CLIENT__CERT`, `…TLS__CLIENT__KEY`).

A worker that dies loses nothing: dask gives its job to another one, up to the scheduler's
`distributed.scheduler.allowed-failures` (3) times, in the same folder, where a trainer goes on from
its checkpoint. Method: dask.distributed's worker resources and resilience (distributed.dask.org).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import secrets
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import Future, wait
from pathlib import Path

from workbench.errors import RunError, WorkbenchError
from workbench.runs.cluster_connection import (
    RESOURCE,
    check_workers,
    connect,
    find_slots,
    how_to_start,
    load_distributed,
    scheduler_address,
)
from workbench.runs.cluster_workers import seal
from workbench.runs.jobs import CANCELLED, FAILS, KILLED, Job, JobResult

WATCH_SECONDS = 2.0  # between two looks at the workers
PATIENCE_SECONDS = 60.0  # with jobs and without workers
GRACE_SECONDS = 15.0  # from a cancel, for workers to end their kernels


def on_cluster(executor: object, folder: str | os.PathLike, at_once: int = 1) -> ClusterExecutor:
    """An executor whose jobs run on a cluster.

    Args:
        executor: a `distributed.Client`; a scheduler's address, `tcp://…` or `tls://…`; or `dask`:
            workers on this machine.
        folder: the sweep's; all workers must see it under the same path.
        at_once: workers that `dask` starts; other clusters have their own number.

    Raises:
        ConfigError: dask.distributed is not installed; or no such executor; or no worker declares
            the resource `mlx`, or one has another workbench.
        RunError: the scheduler does not answer, or a worker does not see the folder.
    """
    with contextlib.ExitStack() as made:
        client = connect(executor, at_once, made)
        slots = find_slots(client)
        seen = check_workers(client, list(slots), Path(folder).resolve())
        machines = Counter(worker.machine for worker in seen.values())
        return ClusterExecutor(client, sum(slots.values()), machines, made.pop_all())


class ClusterExecutor:
    """Runs jobs on the workers of a cluster that declare the resource `mlx`; see `on_cluster`."""

    def __init__(
        self, client: object, at_once: int, machines: Counter[str], made: contextlib.ExitStack
    ):
        self.at_once, self.shares_memory = at_once, set(machines) == {platform.node()}
        self._machines = None if self.shares_memory else machines  # else the sweep shares cores
        self._client, self._made = client, made
        self._address = scheduler_address(client)
        self._event = load_distributed().Event(f"sweep-{secrets.token_hex(8)}", client=client)
        self._pool = client.get_executor(pure=False, retries=0, resources={RESOURCE: 1})
        self._pending: dict[Future, Future] = {}  # a job's outcome → dask's future
        self._cancelled_at: float | None = None
        self._reason: RunError | None = None  # why the watcher gave up
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cluster", daemon=True)
        self._watcher.start()

    def submit(self, job: Job) -> Future[JobResult]:
        """Start a job. The future raises RunError where its folder cannot be used, where the
        scheduler is lost, and where no worker is left."""
        cwd = (job.cwd or job.notebook.parent).resolve()
        job = dataclasses.replace(
            job, notebook=job.notebook.resolve(), folder=job.folder.resolve(), cwd=cwd
        )
        outcome: Future[JobResult] = Future()
        outcome.set_running_or_notify_cancel()
        if self._client.status != "running":
            outcome.set_exception(self._lost())
            return outcome
        function, work = seal(job, self._event.name, self._machines)
        self._pending[outcome] = remote = self._pool.submit(function, work)
        remote.add_done_callback(lambda remote: self._pass_on(remote, outcome))
        return outcome

    def cancel(self) -> None:
        """End all that runs, kernels included; their futures then give `cancelled`."""
        self._cancelled_at = self._cancelled_at or time.monotonic()
        if self._client.status == "running":
            # Without a scheduler, workers end their jobs by themselves.
            with contextlib.suppress(OSError, RuntimeError):
                self._event.set()

    def close(self) -> None:
        """Wait for what runs; then end the workers that were started for this executor."""
        wait(list(self._pending))
        self._closed.set()
        self._watcher.join()
        if self._client.status == "running":
            with contextlib.suppress(OSError, RuntimeError):
                self._event.clear()
        self._made.close()

    def _pass_on(self, remote: Future, outcome: Future[JobResult]) -> None:
        self._pending.pop(outcome, None)
        if remote.cancelled():
            if self._cancelled_at and not self._reason:
                outcome.set_result(JobResult(CANCELLED, error="cancelled"))
            else:
                outcome.set_exception(self._reason or self._lost())
        elif (error := remote.exception()) is None:
            outcome.set_result(remote.result())
        elif isinstance(error, WorkbenchError):
            outcome.set_exception(error)
        else:
            outcome.set_result(_as_result(error))

    def _lost(self) -> RunError:
        return RunError(
            "the scheduler is lost",
            where=self._address,
            cure="Start the sweep again: finished runs are kept, the others go on.",
        )

    def _watch(self) -> None:
        """Give up jobs that nobody will run."""
        alone_since = None
        while not self._closed.wait(WATCH_SECONDS):
            now = time.monotonic()
            if self._cancelled_at and now - self._cancelled_at > GRACE_SECONDS:
                self._drop()
            if not self._pending or self._client.status != "running":  # lost: dask ends them
                alone_since = None
                continue
            with contextlib.suppress(OSError, RuntimeError):
                alone = not find_slots(self._client, required=False)
                alone_since = (alone_since or now) if alone else None
            if alone_since and now - alone_since > PATIENCE_SECONDS:
                self._reason = RunError(
                    f"no worker is left that declares the resource {RESOURCE!r}",
                    where=self._address,
                    cure=f"{how_to_start(self._address)}, and start the sweep again: it goes on.",
                )
                self._drop()

    def _drop(self) -> None:
        for remote in list(self._pending.values()):
            remote.cancel()


def _as_result(error: BaseException) -> JobResult:
    """What the sweep may try again: dead workers, and errors of the worker."""
    if isinstance(error, load_distributed().scheduler.KilledWorker):
        times = error.allowed_failures + 1
        return JobResult(KILLED, error=f"{times} workers died while they ran it")
    trace = "".join(traceback.format_exception(error))[-8000:]
    return JobResult(FAILS, error=f"{type(error).__name__}: {error}"[:500], traceback=trace)
