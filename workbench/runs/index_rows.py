"""A run's row of the index: its columns, and that it is what was written."""

from __future__ import annotations

import json
import sqlite3
import zlib
from itertools import chain

from workbench.runs.records import LATEST, OLDEST, Record

VERSION = 2  # of the columns, and of what their checksum covers
TEXTS = {"name", "stamp", "problem", "job_state", "names", "values_", "digest"}
COUNTS = {"steps", "num_results", "checksum"}
WHOLE = {"total_steps", "best_step", "peak_bytes", "process_bytes"}
FIELDS = (*Record._fields[:-1], "values_", "digest", "checksum")  # VALUES is a word of SQL
NAMES, VALUES, STARTED = (FIELDS.index(name) for name in ("names", "values_", "started"))  # JSON
PLAIN = {str, int, float, bool, type(None)}
CREATE = f"CREATE TABLE run ({', '.join(FIELDS)}, PRIMARY KEY (name))"


def _typed(column: str) -> str:
    """A column as the type that it must have, whatever the file holds."""
    if column in TEXTS:
        return f"COALESCE(CAST({column} AS TEXT), '')"
    if column in COUNTS:
        return f"COALESCE(CAST({column} AS INTEGER), 0)"
    return f"CAST({column} AS {'INTEGER' if column in WHOLE else 'REAL'})"


SELECT = f"SELECT {', '.join(map(_typed, FIELDS))} FROM run"


def as_records(rows: list[tuple]) -> dict[str, Record]:
    """Rows as records by name.

    Raises:
        sqlite3.DatabaseError: they hold something else than was written.
    """
    try:
        names = {text: tuple(json.loads(text)) for text in {row[NAMES] for row in rows}}
        values = json.loads(f"[{','.join([row[VALUES] for row in rows])}]")  # at once: it is faster
        fits = len(values) == len(rows) and all(
            type(own) is list and len(own) == len(names[row[NAMES]])
            for own, row in zip(values, rows)
        )
        kinds = set(map(type, chain.from_iterable(values)))
        fits = fits and set(map(type, chain.from_iterable(names.values()))) <= {str}
    except (ValueError, TypeError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"a row is damaged: {error}") from None
    times = {row[STARTED] for row in rows} - {None}
    fits = fits and all(OLDEST <= time < LATEST for time in times)
    if not fits or not kinds <= PLAIN or any(row[-1] != _checksum(row[:-1]) for row in rows):
        raise sqlite3.DatabaseError("a row is damaged")
    return {row[0]: Record(*row[:NAMES], names[row[NAMES]], own) for row, own in zip(rows, values)}


def as_row(record: Record, digest: str) -> tuple:
    """A record, and the digest of its metrics, as values of `FIELDS`."""
    row = (*record[:NAMES], json.dumps(record.names), json.dumps(record.values), digest)
    return (*row, _checksum(row))


def _checksum(row: tuple) -> int:
    """Of a row's values: SQLite itself does not notice a bit that has changed in one of them."""
    return zlib.crc32(ascii(row).encode())
