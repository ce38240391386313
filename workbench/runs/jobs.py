"""One notebook with its parameters, executed in a process of its own that is watched.

The process runs `execution.py` by its path: it needs papermill, and not MLX, which takes seconds
to load. The notebook's kernel is its child; neither outlives the other, nor the one who watches.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from workbench.errors import RunError
from workbench.machine import process_memory
from workbench.runs import lock
from workbench.runs.store import FAILED, JOB_FOLDER, LOG, NOTEBOOK

SCRIPT = Path(__file__).with_name("execution.py")
FINISHED, FAILS, KILLED, CANCELLED = "finished", "failed", "killed", "cancelled"
POLL_SECONDS = 0.2
WAIT_SECONDS = 10.0  # for an earlier attempt, whose watcher was killed, to end
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A notebook to execute once.

    Its executed copy becomes `folder/notebook.ipynb`, or `failed.ipynb`; what the cells print goes
    to `log.txt` at once.
    """

    notebook: Path
    parameters: Mapping[str, object]  # JSON values for names of the parameters cell
    folder: Path  # the run folder; made if needed
    threads: int = 1  # of the BLAS
    cwd: Path | None = None  # where the cells run; None: the notebook's folder


@dataclass(frozen=True)
class JobResult:
    """How one attempt at a job ended."""

    state: str  # finished; failed: a cell raised; killed: a process died; cancelled
    seconds: float = 0.0  # from start to end
    cells_seconds: float = 0.0  # of them, in the notebook's cells
    peak_bytes: int = 0  # most memory that its processes held together
    error: str = ""  # one line
    cell: int | None = None  # execution count of the cell that failed
    traceback: str = ""


class Executor(Protocol):
    """Where jobs run. Retries, memory and order are the sweep's business, not the executor's."""

    at_once: int  # jobs that may run at the same time
    shares_memory: bool  # whether they all run in this machine's memory

    def submit(self, job: Job) -> Future[JobResult]:
        """Start a job. The future raises RunError where the job's folder cannot be used."""

    def cancel(self) -> None:
        """End all that runs, kernels included; their futures then give `cancelled`."""

    def close(self) -> None:
        """Let go of what the executor made; nothing runs any more."""


def run_job(job: Job, cancelled: Callable[[], bool] = lambda: False) -> JobResult:
    """Make one attempt at a job, and wait for its end.

    Args:
        job: what to run; another attempt in the same folder, left by a dead watcher, is waited for.
        cancelled: asked several times a second; True ends the attempt and its kernel.

    Raises:
        RunError: the folder cannot be written, or is in use.
    """
    began, work = time.monotonic(), job.folder / JOB_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        with lock.held(work, WAIT_SECONDS) as held, _clean(work):
            _prepare(job, work)
            outcome, peak_bytes = _execute(job, work, held, cancelled)
            _keep_notebook(job.folder, work, str(outcome["state"]))
    except OSError as error:
        raise unwritable(job.folder, error) from None
    if outcome.pop("disk", False):
        raise unwritable(job.folder, str(outcome["error"]))
    return JobResult(**outcome, seconds=time.monotonic() - began, peak_bytes=peak_bytes)


def unwritable(folder: Path, reason: OSError | str) -> RunError:
    """The error for a folder that the disk does not let us write."""
    reason = reason if isinstance(reason, str) else reason.strerror or str(reason)
    cure = "Free some space, and start again: what was there before is intact."
    return RunError(f"cannot be written ({reason})", where=folder, cure=cure)


@contextlib.contextmanager
def _clean(work: Path) -> Iterator[None]:
    """An empty folder but for its lock, before and after."""
    _empty(work)
    try:
        yield
    finally:
        _empty(work)


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != lock.LOCK_NAME:
            path.unlink(missing_ok=True)


def _prepare(job: Job, work: Path) -> None:
    shutil.copyfile(job.notebook, work / "source.ipynb")
    (work / "runtime").mkdir(mode=0o700)
    cwd = job.cwd or job.notebook.parent
    content = {
        "parameters": dict(job.parameters),
        "cwd": str(cwd.resolve()),
        "watcher": os.getpid(),
    }
    (work / "job.json").write_text(json.dumps(content), encoding="utf-8")


def _execute(
    job: Job, work: Path, held: int, cancelled: Callable[[], bool]
) -> tuple[dict[str, object], int]:
    """The attempt's outcome, as JobResult's fields, and its peak memory."""
    threads = dict.fromkeys(THREADS, str(job.threads))
    runtime = {"JUPYTER_RUNTIME_DIR": str((work / "runtime").resolve())}
    reading, writing = os.pipe()
    with open(reading, "rb") as answer, (job.folder / LOG).open("wb") as log:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT), str(writing)],  # -P: not beside our modules
                cwd=work,
                env={**os.environ, **threads, **runtime},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(writing, held),  # it holds the lock as long as it lives
            )
        finally:
            os.close(writing)
        tree = _Tree(process)
        try:
            stopped = _wait(process, tree, cancelled)
        finally:
            tree.end()
        if stopped:
            return {"state": CANCELLED, "error": "cancelled"}, tree.peak_bytes
        return _outcome(answer.read(), process.returncode, job.folder / LOG), tree.peak_bytes


def _wait(process: subprocess.Popen, tree: _Tree, cancelled: Callable[[], bool]) -> bool:
    """Wait for the process; whether it was cancelled."""
    while True:
        try:
            process.wait(POLL_SECONDS)
            return False
        except subprocess.TimeoutExpired:
            tree.look()
        if cancelled():
            return True


def _outcome(answer: bytes, code: int, log: Path) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        return json.loads(answer)
    last = re.sub(r"\s+", " ", log.read_bytes()[-300:].decode("utf-8", "replace")).strip()
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    error = f"the process that ran the notebook ended with {how}"
    return {"state": KILLED, "error": f"{error}: {last}" if last else error}


def _keep_notebook(folder: Path, work: Path, state: str) -> None:
    executed = work / NOTEBOOK
    if not executed.is_file() or state == CANCELLED:
        return
    if state == FINISHED:
        os.replace(executed, folder / NOTEBOOK)
        (folder / FAILED).unlink(missing_ok=True)
    else:
        os.replace(executed, folder / FAILED)


@dataclass
class _Tree:
    """A process and all that it has started, also when it is dead and they are not."""

    root: subprocess.Popen
    peak_bytes: int = 0
    seen: set[psutil.Process] = field(default_factory=set)

    def look(self) -> None:
        """Note who is there, and what they hold together."""
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.root.pid)
            now = [root, *root.children(recursive=True)]
            self.seen.update(now)
            held = sum(process_memory(process.pid) or 0 for process in now)
            self.peak_bytes = max(self.peak_bytes, held)

    def end(self) -> None:
        """Kill whoever still runs, and wait for them."""
        if self.root.poll() is None:
            self.look()
            self.root.kill()
            self.root.wait()
        for process in self.seen:
            with contextlib.suppress(psutil.Error):  # it checks that the id is still this process's
                process.kill()
        psutil.wait_procs(self.seen, timeout=5)
