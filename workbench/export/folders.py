"""Where an exported model may be put: nothing of somebody else's is overwritten or removed."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from workbench.errors import ConfigError, FileFormatError, RunError
from workbench.export.model_card import CARD_NAME, MARK
from workbench.models.loading import BaseModel
from workbench.runs.commits import MANIFEST_NAME, commit_folder, verify_folder

EXPORTED = {"config.json", CARD_NAME, MANIFEST_NAME}  # files that every export has


def check_place(base: BaseModel, folder: str | os.PathLike, force: bool) -> Path:
    """The folder's real path, if a model may be written there.

    Raises:
        ConfigError: it is the base model's own place, or holds something that is no earlier
            export, or one that was changed since; and not `force`.
    """
    place = Path(os.path.realpath(os.path.expanduser(folder)))
    own = Path(os.path.realpath(base.path))
    if place == own or place in own.parents or own in place.parents:
        raise ConfigError(
            "is the base model's own place",
            where=place,
            cure="Choose another folder: the base model is read from there again.",
        )
    if os.path.lexists(place) and not place.is_dir():
        raise ConfigError("is no folder", where=place, cure="Choose another name.")
    if not force and os.path.lexists(place) and not _is_free(place):
        raise ConfigError(
            "holds something else than an export as it was written",
            where=place,
            cure="Choose another folder; force=True moves what is there aside.",
        )
    return place


def _is_free(place: Path) -> bool:
    if not any(place.iterdir()):
        return True
    try:
        verify_folder(place)
        marked = MARK in (place / CARD_NAME).read_text(encoding="utf-8")
    except (FileFormatError, OSError, UnicodeDecodeError):
        return False
    return marked and all((place / name).is_file() for name in EXPORTED)


def replace_folder(place: Path, write: Callable[[Path], None], force: bool) -> None:
    """Write a folder beside its place and move it there whole.

    An earlier export goes; anything else that `force` is used on is moved aside first, to a free
    name beside it, and back if the writing fails.

    Raises:
        FileFormatError: it cannot be written; what was there is intact.
    """
    aside = None

    def write_and_clear(staging: Path) -> None:
        nonlocal aside
        write(staging)
        if force and place.exists() and not _is_free(place):
            free = (place.with_name(f"{place.name}.before-{n}") for n in itertools.count(1))
            aside = next(path for path in free if not os.path.lexists(path))
            os.rename(place, aside)

    try:
        commit_folder(place.parent, place.name, write_and_clear)
    except BaseException as error:
        if aside is not None:
            with contextlib.suppress(OSError):
                os.rename(aside, place)
        if isinstance(error, RunError):
            raise FileFormatError(error.what, where=place, cure=error.cure) from error
        raise
