"""Delete a run: whole, or not at all; never one that is being written."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from workbench.errors import RunError
from workbench.runs import lock
from workbench.runs.records import is_running, stamp_of

TRASH = ".trash-"  # folders that begin so are being removed; nobody reads them


def delete_run(folder: str | os.PathLike) -> None:
    """Remove a run's folder with all that is in it.

    It is renamed first, so that a process that is killed on the way leaves no half of a run; what
    it does leave, the next call removes.

    Raises:
        RunError: the folder is no run, is a link, is being written, or cannot be removed.
    """
    folder = Path(os.path.abspath(folder))
    _require_idle_run(folder)
    trash = folder.with_name(f"{TRASH}{uuid.uuid4().hex}")
    owner = _Owner()
    lock.take(folder, owner)  # nobody may begin to write there now
    try:
        os.rename(folder, trash)
    except OSError as error:
        raise RunError(f"cannot be deleted ({error.strerror})", where=folder) from None
    finally:
        del owner
    for leftover in folder.parent.glob(f"{TRASH}*"):
        if not leftover.is_symlink() and leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
    if trash.exists():
        cure = "Remove that folder; the run is not listed any more."
        raise RunError("could not be removed wholly", where=trash, cure=cure)


class _Owner:
    """Who holds the lock of a run that is being deleted."""


def _require_idle_run(folder: Path) -> None:
    """Raise RunError unless the folder is a run that nobody writes."""
    if folder.is_symlink():
        raise RunError("is a link", where=folder, cure="Delete the run that it leads to.")
    if not folder.is_dir():
        raise RunError("is no folder", where=folder, cure="wb.runs lists the runs there are.")
    if not stamp_of(folder):
        raise RunError("holds no run", where=folder, cure="Remove it by hand if you mean it.")
    if is_running(folder):
        cure = "Wait for its trainer, or let go of it: del trainer, or restart the kernel."
        raise RunError("is being written", where=folder, cure=cure)
