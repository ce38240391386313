"""Work in a process of its own, which may die: cheap, since it is forked from one that is ready.

The fork server has imported the workbench and computed nothing; a process in which MLX has
computed has threads, and must not be forked.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

RESULT, ERROR = "result.json", "error.txt"
READY = ["workbench", "tests.toy_training", "tests.faults.killing"]  # imported by the server
SECONDS = 120  # limit for one process

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(READY)


def forked(work: Callable[[], object], folder: Path, kill_after: float | None = None) -> int:
    """Run `work` in a forked process; its result goes to `folder/result.json`.

    Args:
        work: a function of a module, or a `functools.partial` of one; returns what JSON can hold.
        folder: gets the result, or the error's text in `error.txt`.
        kill_after: seconds until SIGKILL.

    Returns:
        0, 1 after an error, or minus the number of the signal that ended it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _server.Process(target=_run, args=(work, folder))
    process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    process.join(SECONDS)
    assert process.exitcode is not None, f"{work} does not end"
    return process.exitcode


def result_of(folder: Path) -> object:
    """What the work returned."""
    return json.loads((folder / RESULT).read_text())


def error_of(folder: Path) -> str:
    """How the work failed; nothing if it did not."""
    path = folder / ERROR
    return path.read_text() if path.exists() else ""


def _run(work: Callable[[], object], folder: Path) -> None:
    try:
        (folder / RESULT).write_text(json.dumps(work()))
    except BaseException:
        (folder / ERROR).write_text(traceback.format_exc())
        raise SystemExit(1) from None
