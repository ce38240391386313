"""Execute the notebook of one job: a script that `jobs.py` starts by its path, in `.job`.

It reads `job.json` and `source.ipynb` there, writes `notebook.ipynb`, and its outcome, JSON, into
the pipe that it gets as its argument. It imports nothing of the workbench, which would load MLX.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

if __name__ == "__main__":
    # jsonschema can do without it, and it takes two seconds to compile its grammar
    sys.modules.setdefault("rfc3987_syntax", None)

import nbformat
import papermill
import psutil
import zmq.asyncio
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color
from traitlets import Type

OUT_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
MAX_ERROR, MAX_TRACEBACK = 500, 8000  # characters; all must fit into a pipe that nobody reads yet
OUTPUT = "notebook.ipynb"
OUTPUT_SECONDS = 3600  # for what a cell has printed to be read after its end
LONGEST_FOLDER = 80  # bytes: macOS takes 103 for the name of a socket


# In IPython's kernel: its socket of outputs holds what the other end has not taken yet.
HOLD_ALL = (
    "(lambda thread: thread.schedule(lambda: "
    "thread.socket.setsockopt(__import__('zmq').SNDHWM, 0)))(get_ipython().kernel.iopub_thread)"
)


class _Client(AsyncKernelClient):
    """Has a kernel keep what it sends, and keeps itself what was not read yet."""

    def _context_default(self) -> zmq.asyncio.Context:
        self._created_context = True  # which is closed with the client
        context = zmq.asyncio.Context()
        context.setsockopt(zmq.RCVHWM, 0)
        return context

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        await super().wait_for_ready(timeout)
        if self.parent.ipykernel:
            self.execute(HOLD_ALL, silent=True, store_history=False)


class _Manager(AsyncKernelManager):
    """Reaches its kernel by sockets that are files of a folder of their own.

    Jupyter's default are TCP ports that are free when it looks: of two kernels that start at the
    same time, one may find its port taken, and dies.
    """

    client_factory = Type(_Client)

    def __init__(self, **given: object):
        super().__init__(**given)
        folder = tempfile.mkdtemp(prefix="kernel-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if len(os.fsencode(folder)) <= LONGEST_FOLDER:
            self.transport, self.ip = "ipc", f"{folder}/socket"


# Of a cell that prints faster than its output is read, ZeroMQ drops messages, also the one that
# says that the cell is done; and nbclient waits for that four seconds, then fails the notebook.
WHOLE_OUTPUT = {"kernel_manager_class": _Manager, "iopub_timeout": OUTPUT_SECONDS}


class Printed:
    """What the cells print, on its way to the log, as far as the disk takes it.

    An error here, or in an autosave, would end nbclient's reading of messages: it would then wait
    for the cell for ever. The notebook is saved after each cell instead.
    """

    def write(self, text: str) -> None:
        """Pass a text on."""
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), text.encode("utf-8", "replace"))

    def flush(self) -> None:
        """Nothing is kept back."""


def main() -> None:
    """Execute the job of the current folder."""
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(job["watcher"],), daemon=True).start()
    outcome = _execute(job, Path(OUTPUT).resolve())
    with os.fdopen(int(sys.argv[1]), "wb") as pipe:
        pipe.write(json.dumps(outcome, ensure_ascii=False).encode("utf-8", "replace"))


def _execute(job: dict[str, object], output: Path) -> dict[str, object]:
    """The outcome, as fields of JobResult; `disk` says that it is the disk's fault."""
    outcome: dict[str, object] = {"state": "finished"}
    try:
        papermill.execute_notebook(
            "source.ipynb",
            OUTPUT,
            job["parameters"],
            cwd=job["cwd"],
            progress_bar=False,
            autosave_cell_every=0,
            **WHOLE_OUTPUT,
            stdout_file=Printed(),
            stderr_file=Printed(),
        )
    except PapermillExecutionError as error:
        outcome = {
            "state": "failed",
            "error": f"{error.ename}: {error.evalue}"[:MAX_ERROR],
            "cell": error.exec_count,
            "traceback": strip_color("\n".join(error.traceback))[-MAX_TRACEBACK:],
        }
    except DeadKernelError:
        outcome = {"state": "killed", "error": "the kernel died; for want of memory?"}
    except Exception as error:  # no such kernel, no notebook: whatever papermill meets
        return _refusal(error)
    try:
        return outcome | {"cells_seconds": _seal(output)}
    except OSError as error:
        return _refusal(error)


def _refusal(error: Exception) -> dict[str, object]:
    disk = isinstance(error, OSError) and error.errno in OUT_OF_DISK
    reason = f"{type(error).__name__}: {error}"[:MAX_ERROR]
    return {"state": "failed", "error": reason, "disk": disk}


def _seal(output: Path) -> float:
    """Take out papermill's notes on times, paths and states; returns the seconds in all cells."""
    notebook, seconds = nbformat.read(output, as_version=4), 0.0
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        seconds += cell.metadata.pop("papermill", {}).get("duration") or 0.0
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = _joined(cell.outputs)
    nbformat.write(notebook, output)
    return seconds


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Pieces of printed text as one; nbclient's own way takes hours for a line of a megabyte."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if output.output_type == "stream" and before.get("name") == output.name:
            before.text += output.text
        else:
            joined.append(output)
    return joined


def _end_with(watcher: int) -> None:
    """End this process and its kernel when the one who watches it is gone."""
    while os.getppid() == watcher:
        time.sleep(0.5)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    main()
