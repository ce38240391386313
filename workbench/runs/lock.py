"""One writer a run folder: a lock that a crash does not leave behind."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from workbench.errors import RunError

LOCK_NAME = ".lock"

_held: dict[Path, tuple[int, object]] = {}  # folder → its open file, and who may write


def take(folder: Path, owner: object) -> None:
    """Make `owner` the only writer of a folder.

    The system lets go of the lock when the process ends, however it ends. Within one process the
    last owner counts, so that a notebook's cell can run twice.

    Raises:
        RunError: another process writes there, or the lock cannot be made.
    """
    folder = folder.resolve()
    if folder in _held:
        _held[folder] = _held[folder][0], owner
        return
    try:
        handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"cannot be used as a run folder ({error.strerror})", where=folder) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise RunError(
            "is being written by another process",
            where=folder,
            cure="Wait for it, end it, or give this run a folder of its own.",
        ) from None
    _held[folder] = handle, owner


def require_owner(folder: Path, owner: object) -> None:
    """Raise RunError if another owner in this process has taken the folder since."""
    held = _held.get(folder.resolve())
    if held is None or held[1] is not owner:
        raise RunError(
            "has been taken over by a later trainer of this process",
            where=folder,
            cure="Use that trainer, or make a new one on this folder.",
        )
