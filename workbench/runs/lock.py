"""One writer a run folder: a lock that a crash does not leave behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from workbench.errors import RunError

LOCK_NAME = ".lock"
TRIES, PAUSE = 20, 0.01  # a reader that asks whether a folder is held holds it for a moment

_held: dict[Path, tuple[int, weakref.ref]] = {}  # folder → its open file, and who may write


def take(folder: Path, owner: object) -> None:
    """Make `owner` the only writer of a folder, until it is garbage.

    The system lets go of the lock when the process ends, however it ends. Within one process the
    last owner counts, so that a notebook's cell can run twice.

    Raises:
        RunError: another process writes there, or the lock cannot be made.
    """
    folder = folder.resolve()
    if folder in _held and not _is_open_file(_held[folder][0], folder / LOCK_NAME):
        os.close(_held.pop(folder)[0])  # the folder was deleted, and perhaps made anew
    handle = _held[folder][0] if folder in _held else _lock(folder)
    _held[folder] = handle, weakref.ref(owner, lambda dead: _let_go(folder, dead))


def owner_of(folder: Path) -> object | None:
    """Who may write a folder in this process; None if nobody here does."""
    held = _held.get(folder.resolve())
    return held[1]() if held else None


@contextlib.contextmanager
def held(folder: Path, seconds: float) -> Iterator[int]:
    """Hold a folder's lock inside a `with` block; waits for another holder at most `seconds`.

    Yields:
        the open file that is locked; a child process that inherits it holds the lock as well.

    Raises:
        RunError: another still holds it, or it cannot be made.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            handle = _lock(folder)
            break
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(folder: Path) -> int:
    try:
        handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"cannot be used as a run folder ({error.strerror})", where=folder) from None
    for _ in range(TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            time.sleep(PAUSE)
    os.close(handle)
    raise RunError(
        "is being written by another process",
        where=folder,
        cure="Wait for it, end it, or give this run a folder of its own.",
    )


def is_held(folder: str | os.PathLike) -> bool:
    """Whether anybody, in this process or another, holds a folder's lock; makes no file.

    It asks by taking the lock together with other readers, and letting go at once.
    """
    try:  # without waiting for the writer of a pipe
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(os.path.join(folder, LOCK_NAME), flags)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(handle)


def _is_open_file(handle: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _let_go(folder: Path, dead: weakref.ref) -> None:
    if folder in _held and _held[folder][1] is dead:
        os.close(_held.pop(folder)[0])
