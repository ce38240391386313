"""Signs of life of a rank, for the supervisor on the same machine that started it.

A rank writes a few bytes into a file of the launch's private folder whenever it begins to wait for
the others and whenever it goes on. It ends itself when the supervisor or that folder is gone.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

LAUNCH_VARIABLE = "WORKBENCH_LAUNCH"  # "pid:folder" of the supervisor
# Joins the others; computes; waits for the others; found them gone, or elsewhere in the program.
CALLING, WORKING, WAITING, LOST = range(4)
RECORD = struct.Struct("<qqd")  # pid, state, seconds of the monotonic clock
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life."""

    pid: int  # of the process that joined: a kernel's, where a notebook runs
    state: int  # CALLING, WORKING, WAITING or LOST
    since: float  # seconds of the clock that all processes share and nobody sets


class BeatFile:
    """Where a rank writes its signs of life; costs some microseconds each.

    Args:
        folder: the launch's private one.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int):
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._handle = os.open(_path(folder, rank), flags, 0o600)

    def write(self, state: int) -> None:
        """Say what this rank does from now on."""
        os.pwrite(self._handle, RECORD.pack(os.getpid(), state, time.monotonic()), 0)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """A rank's last sign of life; None before the first."""
    with contextlib.suppress(OSError, struct.error):
        return Beat(*RECORD.unpack(_path(folder, rank).read_bytes()))
    return None


def follow_launcher(rank: int) -> BeatFile | None:
    """The file for this rank's signs of life; None where no supervisor of ours started it.

    From now on the process ends when the supervisor has ended, however that was.
    """
    pid, _, folder = os.environ.get(LAUNCH_VARIABLE, "").partition(":")
    if not (pid.isdigit() and Path(folder).is_dir()):
        return None
    try:
        launcher = psutil.Process(int(pid))
    except psutil.Error:
        os._exit(1)  # gone before we came
    threading.Thread(target=_watch, args=(launcher, Path(folder)), daemon=True).start()
    return BeatFile(Path(folder), rank)


def _watch(launcher: psutil.Process, folder: Path) -> None:
    while _lives(launcher) and folder.is_dir():
        time.sleep(POLL_SECONDS)
    os._exit(1)  # the main thread may wait for a peer that never answers


def _lives(process: psutil.Process) -> bool:
    # Its time of creation says nothing: it moves whenever the system's clock is set.
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.beat"
