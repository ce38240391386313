"""Where the reading of a stream stands, as data that a checkpoint can keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from workbench.data.examples import Example
from workbench.data.stream_files import Place, Row, StreamFile, changed
from workbench.errors import RunError

LARGEST = 2**63  # bytes, lines and rows are fewer
COUNTS = (  # fields of a position that are saved as they are
    "epoch",
    "window",
    "place",
    "offset",
    "line",
    "sum",
    "disk_bytes",
    "passed_bytes",
    "used",
    "truncated",
    "num_bad",
)


class BadLine(NamedTuple):
    """A line that was skipped."""

    path: str
    line: int  # from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


MicroBatch = list[tuple[Row, Example]]


@dataclass
class Position:
    """Where the reading stands: nothing else decides which rows come next."""

    sums: list[int | None]  # CRC-32 of each file that has been read whole
    epoch: int = 0  # passes that are done
    window: int = 0  # of the pass
    place: int = 0  # files of the pass that are done
    offset: int = 0  # bytes of the file that is being read
    line: int = 0  # lines of it
    sum: int = 0  # CRC-32 of them
    disk_bytes: int = 0  # that were read in this pass
    passed_bytes: int = 0  # of the pass's files that are done, unpacked
    used: int = 0  # rows of the pass that were put into micro-batches
    truncated: int = 0  # rows that were cut to max_length, in all
    num_bad: int = 0  # lines that were skipped in the first pass
    bad: list[BadLine] = field(default_factory=list)  # the first of them
    buffer: list[Row] = field(default_factory=list)
    buffer_bytes: int = 0  # of their texts
    ready: list[MicroBatch] = field(default_factory=list)  # that come next

    def copy(self) -> Position:
        """One whose lists are its own."""
        lists = {name: [*getattr(self, name)] for name in ("sums", "bad", "buffer", "ready")}
        return dataclasses.replace(self, **lists)


@dataclass(frozen=True)
class SavedPosition:
    """What a checkpoint holds: a position whose rows are still to be fetched."""

    position: Position  # without rows
    buffer: list[Place]
    ready: list[list[Place]]


def as_state(position: Position, files: Sequence[StreamFile], served: int) -> dict[str, object]:
    """A position as JSON, without the first `served` of its micro-batches."""
    ready = position.ready[served:]
    return {
        "files": [[file.path.name for file in files], *map(list, zip(*map(_mark, files)))],
        "sums": position.sums,
        **{name: getattr(position, name) for name in COUNTS},
        "bad": [list(line) for line in position.bad],
        "buffer": _columns(position.buffer),
        "ready": _columns([row for batch in ready for row, _ in batch]),
        "sizes": [len(batch) for batch in ready],
    }


def from_state(state: object, files: Sequence[StreamFile], where: object) -> SavedPosition:
    """The position that a checkpoint holds.

    Args:
        state: what `as_state` gave.
        files: of the stream that shall go on.
        where: the checkpoint, for messages.

    Raises:
        RunError: the files are others, or the state is no such position.
    """
    state = state if isinstance(state, Mapping) else {}
    _require_same(state.get("files"), files, where)
    counts = {name: state.get(name) for name in COUNTS}
    sums, bad, sizes = state.get("sums"), state.get("bad"), state.get("sizes")
    buffer, ready = (_places(state.get(name), len(files)) for name in ("buffer", "ready"))
    sound = _are_counts(counts.values()) and counts["place"] <= len(files)
    sound = sound and isinstance(sums, list) and len(sums) == len(files)
    sound = sound and _are_counts(number for number in sums if number is not None)
    sound = sound and isinstance(bad, list) and all(map(_is_bad_line, bad))
    sound = sound and isinstance(sizes, list) and _are_counts(sizes) and 0 not in sizes
    if not sound or buffer is None or ready is None or sum(sizes) != len(ready):
        raise RunError("does not hold a position in a stream", where=where)
    position = Position(sums, **counts, bad=[BadLine(*line) for line in bad])
    rows = iter(ready)
    return SavedPosition(position, buffer, [[next(rows) for _ in range(size)] for size in sizes])


def _mark(file: StreamFile) -> tuple[int, str]:
    return file.size, file.head


def _require_same(saved: object, files: Sequence[StreamFile], where: object) -> None:
    """Raise RunError, naming the first file that differs, unless all are as they were."""
    is_table = isinstance(saved, list) and len(saved) == 3 and all(map(_is_list, saved))
    if not is_table:
        raise RunError("does not hold a position in a stream", where=where)
    before = list(zip(*saved))
    for (name, *mark), file in zip(before, files):
        if name != file.path.name:
            raise RunError(
                f"the run read {str(name)[:100]!r} in place of this file",
                where=file.path,
                cure="Give the stream the same files, or start a new run in another folder.",
            )
        if mark != [*_mark(file)]:
            raise changed(file.path)
    if len(before) != len(files):
        raise RunError(
            f"holds a run over {len(before)} files, the stream has {len(files)}",
            where=where,
            cure="Give the stream the same files, or start a new run in another folder.",
        )


def _columns(rows: Sequence[Row]) -> list[list[int]]:
    """Where rows lie, by columns: file, offset, line, sum."""
    return [list(column) for column in zip(*(row[:4] for row in rows))]


def _places(columns: object, num_files: int) -> list[Place] | None:
    """Places of rows from their columns; None if they are none."""
    if columns == []:
        return []
    if not (isinstance(columns, list) and len(columns) == 4 and all(map(_is_list, columns))):
        return None
    alike = {len(column) for column in columns} == {len(columns[0])} != {0}
    if not alike or not all(map(_are_counts, columns)) or max(columns[0]) >= num_files:
        return None
    return list(zip(*columns))


def _are_counts(values: object) -> bool:
    return all(type(value) is int and 0 <= value < LARGEST for value in values)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_bad_line(line: object) -> bool:
    return isinstance(line, list) and [type(part) for part in line] == [str, int, str]
