"""Files of a stream: which they are, whether they are still the same, and their lines in turn."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from workbench.data.rows import GZIP, MAX_LINE_BYTES
from workbench.errors import DataError, RunError
from workbench.models.regular_files import open_regular

HEAD_BYTES = 65_536  # by whose hash, and its size, a file is known again
BLOCK_BYTES = 1_048_576
ENDINGS = (".jsonl", ".jsonl.gz")  # of a folder's files
# Names that a folder keeps back; in parts as well, as of the Hub: test-00000-of-00002.jsonl.
HELD_OUT = re.compile(r"(valid|validation|val|dev|eval|test)(-\d+-of-\d+)?\.", re.IGNORECASE)
CURE = "Give a .jsonl or .jsonl.gz file, a folder of them, a pattern such as 'data/*.gz', a list."


@dataclass(frozen=True)
class StreamFile:
    """A file as it was when the stream was made."""

    path: Path
    size: int  # bytes on the disk
    head: str  # SHA-256 of the first HEAD_BYTES
    is_gzip: bool
    inside: Path | None = None  # the folder that links may not lead out of

    def open(self) -> BinaryIO:
        """Open it; raises RunError unless size and head are as they were."""
        file = open_regular(self.path, inside=self.inside, kind=RunError)
        with contextlib.ExitStack() as undo:
            undo.callback(file.close)
            if _describe(file, self.path) != (self.size, self.head, self.is_gzip):
                raise changed(self.path)
            file.seek(0)
            undo.pop_all()
        return file


class Row(NamedTuple):
    """A line that waits, and where it can be read again."""

    file: int  # number of its file in the stream
    offset: int  # where it begins: bytes, of what was unpacked
    line: int  # its number in the file, from 1
    sum: int  # CRC-32 of the text
    text: bytes


Place = tuple[int, int, int, int]  # a row without its text


def changed(path: Path) -> RunError:
    """The error for a file that is not what it was when the run began to read it."""
    return RunError(
        "was changed since the run began to read it",
        where=path,
        cure="Put it back as it was, or start a new run in another folder.",
    )


def find_files(source: object) -> tuple[StreamFile, ...]:
    """The files of a source, in the order of their names.

    Args:
        source: a file; a folder, of which every *.jsonl and *.jsonl.gz is taken but those named
            valid, validation, val, dev, eval and test, or parts of these; a pattern with `*`,
            `?`, `[…]` or `**`; or a list of these.

    Raises:
        DataError: nothing there, no regular file, a link out of the folder, a file named twice, or
            one named .gz that is none.
    """
    sources = source if isinstance(source, list | tuple) else [source]
    paths = [found for one in sources for found in _paths(one)]
    if not paths:
        raise DataError("no files are named", cure=CURE)
    files, there = [], set()
    for path, inside in paths:
        with open_regular(path, inside=inside, kind=DataError) as file:
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) in there:
                what = "is named twice, so its rows would be trained twice a pass"
                raise DataError(what, where=path)
            there.add((status.st_dev, status.st_ino))
            size, head, is_gzip = _describe(file, path)
            if path.name.lower().endswith(".gz") and not is_gzip:
                what = "is no gzip file" if size >= len(GZIP) else "gzip file is cut short"
                cure = "Fetch or pack it again; a file that is not packed has no .gz in its name."
                raise DataError(f"{what} ({size} bytes)", where=path, cure=cure)
            files.append(StreamFile(path, size, head, is_gzip, inside))
    return tuple(files)


def _paths(one: object) -> list[tuple[Path, Path | None]]:
    """Paths that a source names, each with the folder that it may not lead out of."""
    if not isinstance(one, str | os.PathLike):
        raise DataError(f"rows cannot be streamed from a {type(one).__name__}", cure=CURE)
    text = os.path.abspath(os.path.expanduser(os.fspath(one)))
    folder = Path(text)
    if os.path.isdir(text):
        try:
            names = sorted(name for name in os.listdir(text) if name.endswith(ENDINGS))
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=text) from None
        kept = [name for name in names if not HELD_OUT.match(name)]
        if not kept:
            raise DataError("holds no *.jsonl or *.jsonl.gz to train on", where=text)
        return [(folder / name, folder) for name in kept]
    if os.path.lexists(text) or not set(text) & set("*?["):
        return [(folder, None)]
    found = sorted(name for name in glob.glob(text, recursive=True) if not os.path.isdir(name))
    if not found:
        raise DataError("no file has such a name", where=text, cure=CURE)
    return [(Path(name), None) for name in found]


def _describe(file: BinaryIO, path: Path) -> tuple[int, str, bool]:
    """Size, hash of the head, and whether it is gzip."""
    try:
        head, size = file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None
    return size, hashlib.sha256(head).hexdigest(), head.startswith(GZIP)


class Lines:
    """One file's lines in turn. `offset`, `number` and `sum` say how far it has been read.

    Args:
        file: opened at its beginning.

    Raises:
        RunError: it was changed since the stream was made.
    """

    def __init__(self, file: StreamFile):
        self.file, self._raw = file, file.open()
        self._text = gzip.GzipFile(fileobj=self._raw, mode="rb") if file.is_gzip else self._raw
        self.offset = 0  # bytes, of what was unpacked
        self.number = 0  # lines
        self.sum = 0  # CRC-32 of all of it

    def next(self) -> bytes | None:
        """The next line; b"" at the end, None for one that is too long, which is passed over.

        Raises:
            DataError: the file cannot be unpacked or read beyond this line.
            RunError: its end is not where it was.
        """
        line = piece = self._piece(self._text.readline, MAX_LINE_BYTES + 1)
        if not line:
            size = os.fstat(self._raw.fileno()).st_size
            if size != self.file.size or not (self.file.is_gzip or self.offset == size):
                raise changed(self.file.path)
            return b""
        self.number += 1
        if len(line) <= MAX_LINE_BYTES:
            return line
        while piece and not piece.endswith(b"\n"):
            piece = self._piece(self._text.readline, BLOCK_BYTES)
        return None

    def go_to(self, offset: int, number: int, sum_: int) -> None:
        """Go on behind `number` lines. What lies before is read, not parsed: is it the same still?

        Raises:
            RunError: it is not.
        """
        if self.file.is_gzip:
            while self.offset < offset and self.next() != b"":
                pass
        else:
            while self.offset < offset:
                if not self._piece(self._raw.read, min(BLOCK_BYTES, offset - self.offset)):
                    break
            self.number = number
        if (self.offset, self.number, self.sum) != (offset, number, sum_):
            raise changed(self.file.path)

    def at(self, place: Place) -> Row:
        """The row at a place, which must not lie before the last one that was asked for."""
        self._guarded(self._text.seek, place[1])
        text = self._guarded(self._text.readline, MAX_LINE_BYTES + 1)
        if zlib.crc32(text) != place[3]:
            raise changed(self.file.path)
        return Row(*place, text)

    @property
    def disk_bytes(self) -> int:
        """Bytes on the disk that have been read; of gzip, in whole pieces."""
        return self._raw.tell() if self.file.is_gzip else self.offset

    def close(self) -> None:
        """Close the file."""
        self._text.close()
        self._raw.close()

    def _piece(self, read: Callable[[int], bytes], size: int) -> bytes:
        piece = self._guarded(read, size)
        self.offset += len(piece)
        self.sum = zlib.crc32(piece, self.sum)
        return piece

    def _guarded(self, call: Callable[[int], object], argument: int) -> object:
        try:
            return call(argument)
        except (EOFError, zlib.error, OSError) as error:
            kind = "is damaged or cut short" if self.file.is_gzip else "cannot be read"
            raise DataError(
                f"the {'gzip ' if self.file.is_gzip else ''}file {kind} here ({error})",
                where=f"{self.file.path}:{self.number + 1}",
                cure="Fetch or pack the file again; the lines before this one are whole.",
            ) from None


def fetch(files: Sequence[StreamFile], places: Sequence[Place]) -> list[Row]:
    """Read rows again, each file once and forwards.

    Raises:
        RunError: a file was changed since.
        DataError: one cannot be read.
    """
    return list(map(dict(_fetched(files, places)).__getitem__, places))


def _fetched(files: Sequence[StreamFile], places: Sequence[Place]) -> Iterator[tuple[Place, Row]]:
    for number, group in itertools.groupby(sorted(set(places)), key=lambda place: place[0]):
        with contextlib.closing(Lines(files[number])) as lines:
            for place in group:
                yield place, lines.at(place)
