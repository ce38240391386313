"""Rows of a stream drawn at random from a buffer of lines that is kept full."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from workbench.data.examples import Example
from workbench.data.rows import MAX_LINE_BYTES, parse_row
from workbench.data.stream_files import Lines, Row, fetch
from workbench.data.stream_position import BadLine, MicroBatch, Position, from_state
from workbench.errors import DataError, RunError

if TYPE_CHECKING:
    from workbench.data.streams import StreamDataset

BUFFER_BYTES = 256_000_000  # of lines: the buffer is full with fewer rows, if they are long
KEPT_BAD_LINES = 20  # whose reasons are kept
REASON_LENGTH = 200  # characters of one


class StreamReader:
    """Draws the rows of one pass after another; `position` is all that it knows of its place.

    Args:
        data: the stream.
        check: raises DataError for an example that the network cannot take.
    """

    def __init__(self, data: StreamDataset, check: Callable[[Example], None]):
        self.data, self._check = data, check
        self.position = Position([None] * len(data.files))
        self._lines: Lines | None = None  # the file that is being read, if it is open

    def draw(self, random: np.random.Generator) -> tuple[Row, Example] | None:
        """A row that can be trained on, and its example; None at the end of the pass.

        Raises:
            DataError: too many lines cannot be trained on, or a file cannot be unpacked.
            RunError: a file was changed.
        """
        at = self.position
        while True:
            self._fill()
            if not at.buffer:
                return None
            place = int(random.integers(len(at.buffer)))
            row, at.buffer[place] = at.buffer[place], at.buffer[-1]
            at.buffer.pop()
            at.buffer_bytes -= len(row.text)
            try:
                example = self._example(row)
            except DataError as error:
                self._note_bad(row.file, row.line, error)
                continue
            at.used += 1
            at.truncated += example.truncated
            return row, example

    @property
    def pass_is_over(self) -> bool:
        """Whether every row of the pass has been drawn."""
        return self.position.place == len(self.data.files) and not self.position.buffer

    def begin_pass(self) -> None:
        """Begin with the first file of the next pass."""
        at = self.position
        at.epoch += 1
        at.window = at.place = at.offset = at.line = at.sum = 0
        at.disk_bytes = at.passed_bytes = at.used = 0

    def note_place(self) -> None:
        """Bring what the position says of the open file up to date."""
        at, lines = self.position, self._lines
        at.disk_bytes = sum(self.data.files[number].size for number in self._order[: at.place])
        if lines is not None:
            at.offset, at.line, at.sum = lines.offset, lines.number, lines.sum
            at.disk_bytes += lines.disk_bytes

    def go_to(self, position: Position) -> None:
        """Go on from a position; its file is opened when it is needed."""
        self._close()
        self.position = position

    def restore(self, state: object, where: object) -> None:
        """Go on from what `as_state` gave; the files are looked at, rows that waited read again.

        Raises:
            RunError: the files are not what they were, or the state is none.
        """
        saved, files = from_state(state, self.data.files, where), self.data.files
        held = fetch(files, [*saved.buffer, *(place for b in saved.ready for place in b)])
        position, rows = saved.position, iter(held[len(saved.buffer) :])
        position.buffer = held[: len(saved.buffer)]
        position.buffer_bytes = sum(len(row.text) for row in position.buffer)
        position.ready = [self._encoded_again([next(rows) for _ in b]) for b in saved.ready]
        before = self.position
        self.go_to(position)
        try:
            if position.place < len(files):
                self._open()
        except BaseException:
            self.go_to(before)
            raise

    def named_bad(self) -> str:
        """The bad lines that are kept, for an error."""
        return "".join(f"\n  {line}" for line in sorted(self.position.bad))

    def _fill(self) -> None:
        at = self.position
        while len(at.buffer) < self.data.buffer_rows and at.buffer_bytes < BUFFER_BYTES:
            row = self._next_row()
            if row is None:
                return
            at.buffer.append(row)
            at.buffer_bytes += len(row.text)

    def _next_row(self) -> Row | None:
        """The next line that is not blank; None at the end of the pass."""
        at = self.position
        while at.place < len(self.data.files):
            lines = self._lines or self._open()
            start, number = lines.offset, self._order[at.place]
            text = lines.next()
            if text == b"":
                self._end_file(number, lines)
            elif text is None:
                too_long = DataError(f"is longer than {MAX_LINE_BYTES} bytes")
                self._note_bad(number, lines.number, too_long)
            elif not text.isspace():
                return Row(number, start, lines.number, zlib.crc32(text), text)
        return None

    @property
    def _order(self) -> tuple[int, ...]:
        return _file_order(len(self.data.files), self.data.seed, self.position.epoch)

    def _open(self) -> Lines:
        at = self.position
        lines = Lines(self.data.files[self._order[at.place]])
        with contextlib.ExitStack() as undo:
            undo.callback(lines.close)
            lines.go_to(at.offset, at.line, at.sum)
            undo.pop_all()
        self._lines = lines
        return lines

    def _end_file(self, number: int, lines: Lines) -> None:
        at, before = self.position, self.position.sums[number]
        if before not in (None, lines.sum):
            raise RunError(
                "was changed since the pass before",
                where=lines.file.path,
                cure="Put it back as it was, or start a new run in another folder.",
            )
        at.sums[number] = lines.sum
        at.passed_bytes += lines.offset
        at.place, at.offset, at.line, at.sum = at.place + 1, 0, 0, 0
        self._close()

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        self._lines = None

    def _example(self, row: Row) -> Example:
        where = f"{self.data.files[row.file].path}:{row.line}"
        example = self.data.encode(parse_row(row.text, where), where)
        self._check(example)
        return example

    def _encoded_again(self, rows: list[Row]) -> MicroBatch:
        try:
            return [(row, self._example(row)) for row in rows]
        except DataError as error:
            what = f"can no longer be trained on ({error.what})"
            raise RunError(what, where=error.where) from None

    def _note_bad(self, file: int, line: int, error: DataError) -> None:
        """Count a bad line of the first pass, in which later ones are counted already."""
        at, path, most = self.position, str(self.data.files[file].path), self.data.max_bad_lines
        if at.epoch:
            return
        at.num_bad += 1
        if len(at.bad) < KEPT_BAD_LINES:
            within = error.where.removeprefix(f"{path}:{line}").lstrip(", ")
            reason = f"{within}: {error.what}" if within else error.what
            at.bad.append(BadLine(path, line, reason[:REASON_LENGTH]))
        if at.num_bad > most:
            raise DataError(
                f"more than {most} lines cannot be trained on{self.named_bad()}",
                where=self.data.name,
                cure="Mend them, or raise max_bad_lines.",
            )


@functools.lru_cache(maxsize=4)
def _file_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Numbers of the files in the order in which a pass reads them."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(count).tolist())
