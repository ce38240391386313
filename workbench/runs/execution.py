"""Execute the notebook of one job: a script that `jobs.py` starts by its path, in `.job`.

It reads `job.json` and `source.ipynb` there, writes `notebook.ipynb`, and its outcome, JSON, into
the pipe that it gets as its argument. It imports nothing of the workbench, which would load MLX.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from pathlib import Path

import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color

OUT_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
MAX_ERROR, MAX_TRACEBACK = 500, 8000  # characters; all must fit into a pipe that nobody reads yet
OUTPUT = "notebook.ipynb"


def main() -> None:
    """Execute the job of the current folder."""
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(job["watcher"],), daemon=True).start()
    output = Path(OUTPUT).resolve()
    outcome = _execute(job) | {"cells_seconds": _cells_seconds(output)}
    with os.fdopen(int(sys.argv[1]), "wb") as pipe:
        pipe.write(json.dumps(outcome, ensure_ascii=False).encode("utf-8", "replace"))


def _execute(job: dict[str, object]) -> dict[str, object]:
    try:
        papermill.execute_notebook(
            "source.ipynb",
            OUTPUT,
            job["parameters"],
            cwd=job["cwd"],
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        return {
            "state": "failed",
            "error": f"{error.ename}: {error.evalue}"[:MAX_ERROR],
            "cell": error.exec_count,
            "traceback": strip_color("\n".join(error.traceback))[-MAX_TRACEBACK:],
        }
    except DeadKernelError:
        return {"state": "killed", "error": "the kernel died; for want of memory?"}
    except Exception as error:  # no such kernel, no notebook: whatever papermill meets
        disk = isinstance(error, OSError) and error.errno in OUT_OF_DISK
        reason = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        return {"state": "failed", "error": reason, "disk": disk}
    return {"state": "finished"}


def _cells_seconds(output: Path) -> float:
    """Time in the cells, by papermill's notes; 0 where it made none."""
    try:
        cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
        return sum(cell["metadata"]["papermill"].get("duration") or 0.0 for cell in cells)
    except (OSError, ValueError, KeyError):
        return 0.0


def _end_with(watcher: int) -> None:
    """End this process and its kernel when the one who watches it is gone."""
    while os.getppid() == watcher:
        time.sleep(0.5)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    main()
