"""In which order MLX evaluates a graph, and how many bytes that holds at each moment.

The order is that of `mlx::core::eval` (0.32): breadth first from the outputs, at most 20 arrays
wide, executed backwards. On a CPU the main thread allocates ahead of the thread that computes, by
up to ten tasks of ten queue entries; whatever a waiting entry reads cannot be freed yet.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench.probes.planning.arrays import ShapeArray

MAX_WIDTH = 20  # arrays; MLX_BFS_MAX_WIDTH
ENTRIES_PER_TASK, TASKS_AHEAD = 10, 10
DONATION_SLACK = 16384  # bytes that a buffer may be too large and still be written over


@dataclass(frozen=True)
class Moment:
    """The fullest moment of an evaluation."""

    parts: Mapping[str, int]  # bytes by part
    operation: str  # that MLX was about to do then

    @property
    def total_bytes(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def evaluation_order(outputs: Sequence[ShapeArray]) -> list[ShapeArray]:
    """The arrays to compute, first to last; of several outputs of one operation, one stands."""
    waiting = _uses(outputs, together=True)
    root = ShapeArray("Synchronize", tuple(outputs), (), 1)
    tape, paused, at = [root], [], 0
    while waiting and (at < len(tape) or paused):
        if at < len(tape):
            array, start = tape[at], 0
            at += 1
        else:
            array, start = paused.pop()
        for place in range(start, len(array.inputs)):
            source = array.inputs[place]
            if source.ready:
                continue
            if len(tape) - at >= MAX_WIDTH:
                paused.append((array, place))
                break
            counted = id(source.leader or source)
            waiting[counted] -= 1
            if not waiting[counted]:
                del waiting[counted]
                tape.append(source)
    return tape[:0:-1]


def _uses(outputs: Sequence[ShapeArray], together: bool = False) -> dict[int, int]:
    """How often each array that is still to be computed is an input, by id.

    The outputs of one operation count each by itself, or together under the first one's id.
    """
    uses: dict[int, int] = {}
    stack, reached = [tuple(outputs)], set()
    while stack:
        for source in stack.pop():
            if source.ready:
                continue
            first = source.leader or source
            counted = id(first if together else source)
            uses[counted] = uses.get(counted, 0) + 1
            if id(first) not in reached:
                reached.add(id(first))
                stack.append(first.inputs)
    return uses


class _Buffer:
    """Memory of one or several arrays."""

    __slots__ = ("arrays", "label", "nbytes", "read_until")

    def __init__(self, nbytes: int, label: str):
        self.nbytes, self.label = nbytes, label
        self.arrays = 1  # that live in it and are still needed
        self.read_until = 0  # the queue entry after which nobody reads it


class _Walk:
    """Follows an evaluation, operation by operation."""

    def __init__(
        self,
        outputs: Sequence[ShapeArray],
        held: Mapping[str, int],
        ahead: int,
        kept: Sequence[ShapeArray],
    ):
        self.kept = {id(array) for array in (*outputs, *kept)}
        self.uses = _uses(outputs)
        self.parts = collections.Counter(held)
        self.total, self.ahead = sum(held.values()), ahead
        self.queued = self.done = 0
        self.buffers: dict[int, _Buffer] = {}
        self.leaving: collections.deque[_Buffer] = collections.deque()
        self.highest, self.peak = self.total, Moment(dict(self.parts), "start")

    def step(self, array: ShapeArray) -> None:
        """One operation is handed to the stream."""
        first = array.leader or array
        made = (first, *first.siblings)
        for output in made:
            self.buffers[id(output)] = self._buffer_for(output)
        buffer = self.buffers[id(array)]
        self.queued += array.queued
        if array.temporary:
            scratch = _Buffer(array.temporary, array.label)
            self._allocate(scratch, array)
            self._leave(scratch)
        for source in array.inputs:
            self._release(source, buffer)
        for output in made:
            if not self.uses.get(id(output)):  # nobody wants it
                self._forget(output)
        self._catch_up()

    def _buffer_for(self, array: ShapeArray) -> _Buffer:
        if array.base is not None:
            shared = self.buffers.get(id(array.base))
            if shared is None:  # a view of what was there before
                return _Buffer(0, array.label)
            shared.arrays += 1
            return shared
        for donor in array.donors:
            buffer = self.buffers.get(id(donor))
            if buffer is not None and self._donatable(donor, buffer, array):
                buffer.arrays += 1
                return buffer
        buffer = _Buffer(array.nbytes, array.label)
        self._allocate(buffer, array)
        return buffer

    def _donatable(self, donor: ShapeArray, buffer: _Buffer, array: ShapeArray) -> bool:
        return (
            self.uses[id(donor)] == 1
            and id(donor) not in self.kept
            and buffer.arrays == 1
            and buffer.read_until <= self.done
            and donor.itemsize == array.itemsize
            and buffer.nbytes <= array.nbytes + DONATION_SLACK
        )

    def _allocate(self, buffer: _Buffer, array: ShapeArray) -> None:
        self.parts[buffer.label] += buffer.nbytes
        self.total += buffer.nbytes
        if self.total > self.highest:
            self.highest, self.peak = self.total, Moment(dict(self.parts), array.op)

    def _release(self, source: ShapeArray, output: _Buffer) -> None:
        buffer = self.buffers.get(id(source))
        if buffer is None:
            return
        if buffer is not output:
            buffer.read_until = self.queued
        self.uses[id(source)] -= 1
        if not self.uses[id(source)]:
            self._forget(source)

    def _forget(self, array: ShapeArray) -> None:
        buffer = self.buffers[id(array)]
        if id(array) not in self.kept:
            buffer.arrays -= 1
            if not buffer.arrays:
                self._leave(buffer)

    def _leave(self, buffer: _Buffer) -> None:
        buffer.read_until = self.queued
        self.leaving.append(buffer)

    def _catch_up(self) -> None:
        """Whatever must have been computed by now is done, and what it read is free."""
        tasks = self.queued // ENTRIES_PER_TASK
        self.done = max(self.done, (tasks - self.ahead) * ENTRIES_PER_TASK)
        while self.leaving and self.leaving[0].read_until <= self.done:
            buffer = self.leaving.popleft()
            self.parts[buffer.label] -= buffer.nbytes
            self.total -= buffer.nbytes


def fullest_moment(
    outputs: Sequence[ShapeArray],
    held: Mapping[str, int],
    ahead: int = TASKS_AHEAD,
    kept: Sequence[ShapeArray] = (),
) -> Moment:
    """Walk through the evaluation of `outputs` on top of what is held all the time.

    Args:
        outputs: what is evaluated; it stays in memory.
        held: bytes by part that are there before and after.
        ahead: tasks that may wait while the main thread goes on allocating.
        kept: what else stays in memory, since Python has a name for it.
    """
    walk = _Walk(outputs, held, ahead, kept)
    for array in evaluation_order(outputs):
        walk.step(array)
    return walk.peak
