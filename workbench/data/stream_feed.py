"""The micro-batches of a stream: a bounded, seeded shuffle over files of any size.

Rows are drawn at random from a buffer of lines, and each draw is made up for by the next line. As
many rows as a window holds are drawn together and sorted by length, so that those of nearly equal
length share a micro-batch; the order of the window's micro-batches is random again. At the end of
a pass the buffer runs empty before the next pass begins.

What comes next is a pure function of the stream, its seed and the `Position`. A window is made
whole or not at all: whatever goes wrong on the way leaves the position as it was before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from workbench.data.batches import Batch, collate
from workbench.data.examples import Example
from workbench.data.stream_position import BadLine, MicroBatch, Position, as_state
from workbench.data.stream_reader import StreamReader
from workbench.errors import DataError, check_whole

if TYPE_CHECKING:
    from workbench.data.streams import StreamDataset

WINDOW_BATCHES = 32  # micro-batches, at least, that are made together
Mark = tuple[Position, int, int]


class StreamFeed:
    """Gives each step its micro-batches from a stream, and can say and find its place.

    Args:
        data: the stream; several feeds may read it.
        micro_batch_size: rows.
        grad_accum_steps: micro-batches a step.
        check: raises DataError for an example that the network cannot take.
    """

    plan = None  # the order is not known beforehand

    def __init__(
        self,
        data: StreamDataset,
        micro_batch_size: int,
        grad_accum_steps: int = 1,
        check: Callable[[Example], None] = lambda example: None,
    ):
        check_whole("micro_batch_size", micro_batch_size, 1)
        check_whole("grad_accum_steps", grad_accum_steps, 1)
        self.data, self._reader = data, StreamReader(data, check)
        self._micro_batch_size, self._accum = micro_batch_size, grad_accum_steps
        self._window_rows = micro_batch_size * grad_accum_steps * -(-WINDOW_BATCHES // self._accum)
        self._total_bytes = sum(file.size for file in data.files)
        self._step = 0  # of the last call, or the first one that may come
        self._served = 0  # its micro-batches: the first of those that are ready

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, counted from 0: that of the last call, or the one after.

        The last step of a pass, and its last micro-batch, may be smaller.

        Raises:
            DataError: too many bad lines, no row to train on, or a file that cannot be unpacked.
            RunError: a file was changed since the stream was made.
        """
        at = self._reader.position
        if step == self._step + 1:
            at.ready, self._served, self._step = at.ready[self._served :], 0, step
        assert step == self._step, "a stream is read forwards"
        if not at.ready:
            self._make_window()
        ready = self._reader.position.ready[: self._accum]
        self._served = len(ready)
        examples = [[example for _, example in batch] for batch in ready]
        return [collate(rows, range(len(rows))) for rows in examples]

    def epoch(self, step: int) -> int:
        """The pass, counted from 1, that the step of the last call belongs to."""
        return self._reader.position.epoch + 1

    @property
    def progress(self) -> float:
        """Share of the pass's bytes whose rows were given out or skipped, from 0 to 1.

        In a gzip file, unpacked bytes are counted as if all were packed alike.
        """
        at = self._reader.position
        read, rest = at.passed_bytes + at.offset, at.ready[self._served :]
        waiting = at.buffer_bytes + sum(len(row.text) for batch in rest for row, _ in batch)
        return at.disk_bytes / self._total_bytes * ((read - waiting) / read) if read else 0.0

    @property
    def num_bad(self) -> int:
        """Lines that were skipped, counted in the first pass: later ones skip the same."""
        return self._reader.position.num_bad

    @property
    def bad_lines(self) -> list[BadLine]:
        """The first that were skipped, by file and line, with the reason."""
        return sorted(self._reader.position.bad)

    @property
    def truncated(self) -> int:
        """Rows that were cut to max_length, counted whenever they were used."""
        return self._reader.position.truncated

    def __str__(self) -> str:
        at = self._reader.position
        return (
            f"pass {at.epoch + 1}, {self.progress:.0%}: {at.used} rows used; "
            f"{at.num_bad} bad lines skipped, {at.truncated} rows cut to max_length"
        )

    def state(self, steps_done: int) -> dict[str, object]:
        """Its place after so many steps, as JSON: files, offsets and counts, no text."""
        served = self._served if steps_done == self._step + 1 else 0
        return as_state(self._reader.position, self.data.files, served)

    def restore(self, state: object, steps_done: int, where: object = "") -> None:
        """Go on from a place; None is the beginning.

        Args:
            state: what `state` gave.
            steps_done: steps that were made until then.
            where: the checkpoint, for messages.

        Raises:
            RunError: the files are not what they were, or the state is none.
        """
        if state is not None:
            self._reader.restore(state, where)
        self._step, self._served = steps_done, 0

    def mark(self) -> Mark:
        """Its place, for `go_back`."""
        return self._reader.position.copy(), self._step, self._served

    def go_back(self, mark: Mark) -> None:
        """Give the same micro-batches again as after the mark."""
        position, self._step, self._served = mark
        self._reader.go_to(position)

    def _make_window(self) -> None:
        before = self._reader.position.copy()
        try:
            if self._reader.pass_is_over:
                self._reader.begin_pass()
            batches = self._window()
            if not batches and self._reader.position.used:  # the pass ended in bad lines
                self._reader.begin_pass()
                batches = self._window()
            if not batches:
                what = f"holds no row that can be trained on{self._reader.named_bad()}"
                raise DataError(what, where=self.data.name)
            self._reader.position.ready = batches
        except BaseException:  # an interrupt, too, must not lose what was drawn
            self._reader.go_to(before)
            raise

    def _window(self) -> list[MicroBatch]:
        """The next micro-batches; none at the end of the pass."""
        at, rows = self._reader.position, []
        random = np.random.default_rng([self.data.seed, at.epoch, at.window])
        while len(rows) < self._window_rows and (row := self._reader.draw(random)) is not None:
            rows.append(row)
        at.window += 1
        self._reader.note_place()
        by_length, size = sorted(rows, key=lambda row: len(row[1])), self._micro_batch_size
        batches = [by_length[start : start + size] for start in range(0, len(rows), size)]
        return [batches[place] for place in random.permutation(len(batches))]
