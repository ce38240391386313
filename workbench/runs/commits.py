"""Folders that are there whole or not at all, whatever stops the process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workbench.errors import FileFormatError, RunError
from workbench.models.files import read_json, write_json

MANIFEST_NAME = "manifest.json"
STAGING = ".tmp-"  # folders that begin so are unfinished; nobody reads them
VERSION = 1


def commit_folder(root: str | os.PathLike, name: str, write: Callable[[Path], None]) -> Path:
    """Make the folder `root/name` in one stroke.

    Files are written beside it, forced to the disk, listed with size and SHA-256 in a manifest,
    and moved into place by one rename. A process that is killed on the way leaves a folder
    `.tmp-…`, never half of `name`.

    Args:
        root: where the folder shall stand; made if needed.
        name: of the folder; one that is there already is replaced.
        write: gets an empty folder, and puts files into it; it need not force them to the disk.

    Raises:
        RunError: the folder cannot be written; nothing is left behind.
    """
    root = Path(root)
    staging = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=root))
        write(staging)
        _seal(staging)
        _move(staging, root / name)
        _force_to_disk(root)
    except (OSError, FileFormatError) as error:
        reason = error.what if isinstance(error, FileFormatError) else error.strerror or error
        raise RunError(
            f"cannot be written ({reason})",
            where=root / name,
            cure="What was there before is intact; free some space or choose another place.",
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return root / name


def verify_folder(folder: str | os.PathLike) -> None:
    """Check that a committed folder holds what its manifest lists, byte for byte.

    Raises:
        FileFormatError: a file is missing, damaged or not listed, or the manifest is.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST_NAME)
    if manifest.get("version") != VERSION or not isinstance(manifest.get("files"), dict):
        raise FileFormatError(
            f"is of version {manifest.get('version')!r}, not {VERSION}",
            where=folder / MANIFEST_NAME,
        )
    there = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
    if there != set(manifest["files"]):
        different = ", ".join(sorted(there ^ set(manifest["files"])))
        raise FileFormatError(f"does not hold the files of its manifest: {different}", where=folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or _describe(path) != entry:
            raise FileFormatError("was changed after it was written", where=path)


def discard_folder(folder: Path) -> None:
    """Remove a committed folder in one stroke: whole, or gone."""
    doomed = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder.parent))
    os.rename(folder, doomed)  # onto an empty folder: replaces it
    shutil.rmtree(doomed, ignore_errors=True)


def recover_folders(root: str | os.PathLike) -> None:
    """Clear away what a killed process left: unfinished folders go, one moved aside comes back.

    Only for the sole writer of `root`.
    """
    for staging in Path(root).glob(f"{STAGING}*"):
        if staging.is_symlink() or not staging.is_dir():
            continue
        for aside in staging.iterdir():
            target = Path(root) / aside.name
            if (aside / MANIFEST_NAME).is_file() and not target.exists():
                with contextlib.suppress(FileFormatError, OSError):
                    verify_folder(aside)
                    os.rename(aside, target)
        shutil.rmtree(staging, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Force a folder's files to the disk, and list them in its manifest."""
    files = sorted(folder.iterdir())
    with ThreadPoolExecutor() as pool:  # the disk works while we hash
        forced = pool.map(_force_to_disk, files)
        entries = dict(zip((path.name for path in files), pool.map(_describe, files)))
        list(forced)  # raises what went wrong
    write_json(folder / MANIFEST_NAME, {"version": VERSION, "files": entries})
    _force_to_disk(folder)


def _describe(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _move(staging: Path, target: Path) -> None:
    """Rename; what stands at the target is moved aside first, and back if that fails."""
    if not target.exists():
        os.rename(staging, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=STAGING, dir=target.parent))
    try:
        os.rename(target, aside / target.name)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(aside / target.name, target)
            raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
