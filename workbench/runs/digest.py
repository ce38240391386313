"""What a run's metrics come to, kept up to date by reading only what was added."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

MAX_METRICS_BYTES = 4_000_000_000  # of a file; a step takes about 600
MAX_LINE_BYTES = 1_000_000
CHUNK_BYTES = 1_000_000
MARKED_BYTES = 4096  # before the place that was read up to: a file that was cut differs there
SPEEDS = 100  # steps whose median throughput is told
LARGEST_WHOLE = 2**53  # a whole number that a float holds as well


@dataclass
class Digest:
    """What a run's metrics come to, as far as they were read; NaN and infinity count nowhere."""

    offset: int = 0  # bytes that were read
    mark: str = ""  # a hash of the last of them
    lines: int = 0
    problem: str = ""  # what is wrong with the line after them
    steps: int = 0  # number of the last step
    total_steps: int | None = None
    loss: float | None = None  # of the last step
    best_valid_loss: float | None = None
    best_step: int | None = None
    seconds: float = 0.0  # of all steps and their validations
    peak_bytes: int | None = None  # largest
    process_bytes: int | None = None  # largest
    speeds: list[float] = field(default_factory=list)  # tokens a second of the last steps

    @property
    def tokens_per_second(self) -> float | None:
        """Median of the last steps."""
        return statistics.median(self.speeds) if self.speeds else None

    def as_json(self) -> str:
        """All of it as JSON."""
        speeds = [float(f"{speed:.5g}") for speed in self.speeds]  # short, for there are many
        return json.dumps({**vars(self), "speeds": speeds})

    @classmethod
    def from_json(cls, text: str) -> Digest:
        """A digest again; an empty one if the text is something else."""
        try:
            digest = cls(**json.loads(text))
            fits = all(_fits(getattr(digest, f.name), str(f.type)) for f in dataclasses.fields(cls))
        except (TypeError, ValueError, RecursionError):
            return cls()
        return digest if fits else cls()

    def add(self, row: dict[str, object]) -> None:
        """Take in a row.

        Raises:
            ValueError: names what is no number.
        """
        step, total = whole(row, "step"), whole(row, "total_steps")
        valid, speed = number(row, "valid_loss"), number(row, "tokens_per_second")
        loss = number(row, "loss") if "loss" in row else self.loss
        seconds = (number(row, "step_seconds") or 0.0) + (number(row, "valid_seconds") or 0.0)
        peak, process = whole(row, "peak_bytes"), whole(row, "process_bytes")
        self.steps = self.steps + 1 if step is None else step
        self.total_steps = self.total_steps if total is None else total
        self.loss, self.seconds = loss, self.seconds + seconds
        if valid is not None and (self.best_valid_loss is None or valid < self.best_valid_loss):
            self.best_valid_loss, self.best_step = valid, self.steps
        self.peak_bytes = max(self.peak_bytes or 0, peak or 0) or None
        self.process_bytes = max(self.process_bytes or 0, process or 0) or None
        if speed is not None:
            self.speeds.append(speed)
            del self.speeds[:-SPEEDS]


def read_on(path: str | os.PathLike, digest: Digest) -> Digest:
    """The digest of a file of metrics, from where an earlier one of it ends.

    A file that was cut or replaced meanwhile is read anew; a last line that is only half written
    is left for the next time. Damage ends the reading, and is the digest's problem.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_METRICS_BYTES:
            raise ValueError(f"is larger than {MAX_METRICS_BYTES} bytes")
        if _mark(file, digest.offset) != digest.mark:
            digest = Digest()
        file.seek(digest.offset)
        digest.problem = ""
        for line in _lines(file):
            try:
                _take(digest, line)
            except (ValueError, RecursionError) as error:
                reason = str(error) if isinstance(error, ValueError) else "is nested too deep"
                digest.problem = f"line {digest.lines + 1} {reason}"
                break
            digest.offset, digest.lines = digest.offset + len(line), digest.lines + 1
        digest.mark = _mark(file, digest.offset)
    return digest


def _mark(file: BinaryIO, offset: int) -> str:
    """A hash of what stands before a place, at least the line that ends there: times are in it."""
    file.seek(max(0, offset - MARKED_BYTES))
    return hashlib.sha256(file.read(min(offset, MARKED_BYTES))).hexdigest()[:32]


def _take(digest: Digest, line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON ({str(error)[:100]})") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    digest.add(row)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines; of one that is too long, its beginning. What has no end yet is left out."""
    rest = b""
    while chunk := file.read(CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > MAX_LINE_BYTES:
            yield rest
            return


def open_plain(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading bytes; neither a link, nor a pipe, nor a device.

    Raises:
        OSError, ValueError: it is one of those, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("is no regular file")
    return open(handle, "rb")


def number(row: dict[str, object], name: str) -> float | None:
    """A finite number of a row; None where there is none, or NaN.

    Raises:
        ValueError: it is something else.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"has the {name} {str(value)[:50]!r}, which is no number")
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise ValueError(f"has a {name} that is too large")
    return float(value) if math.isfinite(value) else None


def whole(row: dict[str, object], name: str) -> int | None:
    """A whole number of a row, from 0; None where there is none.

    Raises:
        ValueError: it is something else.
    """
    value = number(row, name)
    if value is None:
        return None
    if value < 0 or value != int(value) or value > LARGEST_WHOLE:
        raise ValueError(f"has the {name} {value:g}, which is no whole number from 0")
    return int(value)


def _fits(value: object, kind: str) -> bool:
    """Whether a value may stand in a digest's field of this annotation."""
    if value is None:
        return "None" in kind
    if kind.startswith("list"):
        return isinstance(value, list) and all(isinstance(item, float) for item in value)
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return "int" not in kind or (isinstance(value, int) and 0 <= value <= LARGEST_WHOLE)
