"""Files of other people: regular, in their place, of a bounded size, and JSON read strictly."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from workbench.errors import FileFormatError, WorkbenchError

MAX_DEPTH = 64  # objects and lists inside one another
MAX_VALUES = 2_000_000  # of one JSON text; Python takes some hundred bytes for each
SNAPSHOTS, BLOBS = "snapshots", "blobs"  # the Hugging Face cache: names link to content


def check_regular(
    path: str | Path, *, inside: str | Path | None = None, kind: type[WorkbenchError] | None = None
) -> int:
    """Size in bytes of a regular file; devices, pipes and folders are refused without opening.

    Args:
        path: the file.
        inside: the folder that links may not lead out of; None follows them anywhere. In the
            Hugging Face cache, a snapshot's links to the blobs of the same model are at home.
        kind: of the error; default FileFormatError.

    Raises:
        WorkbenchError: absent, not a regular file, or a link out of the folder.
    """
    kind = kind or FileFormatError
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise kind("is not a regular file", where=path, cure="Put the file itself there.")
        if inside is not None and not _is_inside(path, inside):
            raise kind(
                "is a link that leads out of its folder",
                where=path,
                cure="Put the file itself there.",
            )
    except OSError as error:
        raise kind(f"cannot be read ({error.strerror})", where=path) from None
    except ValueError as error:  # pathlib and os: a NUL in the name
        if isinstance(error, WorkbenchError):
            raise
        raise kind(f"cannot be read ({error})", where=repr(path)) from None
    return status.st_size


def _is_inside(path: str | Path, folder: str | Path) -> bool:
    target = Path(os.path.realpath(path, strict=True))
    root = Path(os.path.realpath(folder, strict=True))
    if target.is_relative_to(root):
        return True
    snapshots = next((parent for parent in root.parents if parent.name == SNAPSHOTS), None)
    return snapshots is not None and target.parent == snapshots.parent / BLOBS


def open_regular(
    path: str | Path, *, inside: str | Path | None = None, kind: type[WorkbenchError] | None = None
) -> BinaryIO:
    """Open what `check_regular` accepts, for reading bytes; raises as it does."""
    check_regular(path, inside=inside, kind=kind)
    try:
        # A pipe put there in the meantime would wait for a writer.
        return open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    except OSError as error:
        raise (kind or FileFormatError)(f"cannot be read ({error.strerror})", where=path) from None


def parse_json(content: bytes, *, constants: bool = True) -> object:
    """Parse JSON as its standard has it: UTF-8, no key twice, bounded in size and depth.

    Args:
        content: the text's bytes.
        constants: accept NaN and Infinity, which Python writes and the standard does not know;
            configurations of some models hold them.

    Raises:
        ValueError: says what is wrong.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    try:
        value = (_LENIENT if constants else _STRICT).decode(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH}")


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it has the key {counts.most_common(1)[0][0][:100]!r} twice")
    return content


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON value")


_LENIENT = json.JSONDecoder(object_pairs_hook=_object)
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
