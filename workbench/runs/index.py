"""What is known of many runs, kept in one SQLite file, so that a table need not read them all.

The folders are the truth and the file is a memory of them: a run's trainer never touches it, and
nothing is lost when it is deleted, damaged, locked, or on a disk that cannot be written. Whoever
wants the table brings it up to date, and several processes may do so at once.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from workbench.errors import IndexWarning
from workbench.runs.index_rows import CREATE, FIELDS, SELECT, VERSION, as_records, as_row
from workbench.runs.records import Record, find_runs, printable, read_record, stamp_of

INDEX_NAME = "index.sqlite"
OWN = 0x4D4C5752  # SQLite's application_id of our files
WAIT_SECONDS = 5.0  # for another process that writes
BATCH = 200  # runs that are read, and then written together
READ_ONLY = {"SQLITE_READONLY", "SQLITE_CANTOPEN"}
BUSY = {"SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL"}
FULL = {"SQLITE_FULL", "SQLITE_IOERR"}


class _ForeignError(Exception):
    """The file is not an index."""


def refreshed(root: str | os.PathLike, as_it_is: bool = False) -> list[Record]:
    """A record of every run below a root, from its index, and from the folders that changed.

    Args:
        root: the folder that the runs are in; it gets the index.
        as_it_is: do not look at the folders, if there is an index.

    Raises:
        RunError: the root is no folder, or holds too many.
    """
    root = os.fspath(root)
    with Index(root) as index:
        known = index.records()
        if as_it_is and known:
            return [known[name] for name in sorted(known)]
        found = find_runs(root)
        index.remove(known.keys() - found.keys())
        records = {name: known[name] for name in found if name in known}
        changed = [n for n, stamp in found.items() if n not in known or known[n].stamp != stamp]
        for start in range(0, len(changed), BATCH):
            batch = list(_read(root, changed[start : start + BATCH], found, index))
            index.write(batch)
            records |= {record.name: record for record, _ in batch}
    return [records[name] for name in sorted(records)]


def _read(
    root: str, names: list[str], stamps: dict[str, str], index: Index
) -> Iterator[tuple[Record, str]]:
    """Records, each with the digest of its metrics; of a run that is deleted meanwhile, none."""
    for name in names:
        if not name.isprintable():
            problem = "its folder's name holds characters that cannot be shown"
            yield Record(printable(name, 200), problem=problem), ""
            continue
        record, digest = read_record(root, name, stamps[name], index.digest(name))
        if not record.problem or os.path.isdir(os.path.join(root, name)):
            yield record, digest


class Index:
    """The SQLite file of a root, inside a `with` block; when it fails, nothing is known.

    Args:
        root: the folder that the runs are in. If it is a run itself, it gets no file.
    """

    def __init__(self, root: str | os.PathLike):
        self.path = Path(root) / INDEX_NAME
        self._connection: sqlite3.Connection | None = None
        self._writes = True

    def __enter__(self) -> Index:
        if stamp_of(self.path.parent):
            return self
        try:
            self._open()
        except _ForeignError as error:
            self._say(str(error), "Move it away, and the table is faster.")
        except sqlite3.Error as error:
            self._mend(error)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def records(self) -> dict[str, Record]:
        """What the index knows, by name."""
        try:
            return as_records(self._execute(SELECT))
        except sqlite3.Error as error:
            self._mend(error)
        return {}

    def digest(self, name: str) -> str:
        """How far a run's metrics were read; empty if it is not known."""
        try:
            found = self._execute("SELECT CAST(digest AS TEXT) FROM run WHERE name = ?", (name,))
        except sqlite3.Error:
            return ""
        return found[0][0] or "" if found else ""

    def write(self, rows: Iterable[tuple[Record, str]]) -> None:
        """Keep records and digests."""
        self._change(
            f"INSERT OR REPLACE INTO run VALUES ({', '.join('?' * len(FIELDS))})",
            [as_row(record, digest) for record, digest in rows if record.stamp],
        )

    def remove(self, names: Iterable[str]) -> None:
        """Forget runs."""
        self._change("DELETE FROM run WHERE name = ?", [(name,) for name in names])

    def _execute(self, sql: str, values: tuple = ()) -> list[tuple]:
        with _readable_errors():
            return self._connection.execute(sql, values).fetchall() if self._connection else []

    def _change(self, sql: str, rows: list[tuple]) -> None:
        """All of the rows, or none of them."""
        if not (self._connection and self._writes and rows):
            return
        try:
            self._execute("BEGIN IMMEDIATE")
            with _readable_errors():
                self._connection.executemany(sql, rows)
            self._execute("COMMIT")
        except sqlite3.Error as error:
            self._writes = False
            with contextlib.suppress(sqlite3.Error):
                self._execute("ROLLBACK")
            self._mend(error)

    def _open(self) -> None:
        """Open the file, or make it.

        Raises:
            sqlite3.Error: it cannot be used, or is of another version.
            _ForeignError: it is something else.
        """
        if os.path.lexists(self.path) and not stat.S_ISREG(os.lstat(self.path).st_mode):
            raise _ForeignError("is not a regular file")
        try:
            self._connect("")
        except sqlite3.OperationalError as error:
            if _kind(error) not in READ_ONLY or not self.path.is_file():
                raise
            self._connect("?mode=ro&immutable=1")  # where no lock can be written either
        tables, own = self._schema(), self._execute("PRAGMA application_id")[0][0]  # in this order
        if own != OWN and tables:
            raise _ForeignError("is another program's database")
        if own == OWN and self._is_usual():
            return
        with contextlib.suppress(sqlite3.OperationalError):  # another process is about to
            self._execute("PRAGMA journal_mode = WAL")
        self._execute("BEGIN IMMEDIATE")
        if not self._schema():
            for sql in (CREATE, f"PRAGMA application_id = {OWN}", f"PRAGMA user_version={VERSION}"):
                self._execute(sql)
        self._execute("COMMIT")
        if not self._is_usual():
            raise sqlite3.DatabaseError("it has other columns")

    def _connect(self, options: str) -> None:
        self._close()
        uri = self.path.resolve().as_uri() + options
        self._connection = sqlite3.connect(uri, WAIT_SECONDS, isolation_level=None, uri=True)
        self._execute("PRAGMA synchronous = NORMAL")
        self._schema()  # which reads the file

    def _schema(self) -> list[str]:
        return [sql for (sql,) in self._execute("SELECT sql FROM sqlite_master") if sql]

    def _is_usual(self) -> bool:
        version = self._execute("PRAGMA user_version")[0][0]
        return self._schema() == [CREATE] and version == VERSION

    def _mend(self, error: sqlite3.Error) -> None:
        """Move a damaged file aside and begin anew; else do without."""
        self._close()
        if _kind(error) in READ_ONLY | BUSY | FULL:
            return self._explain(error)
        try:
            with FileLock(self.path.with_name(f".{INDEX_NAME}.lock"), WAIT_SECONDS):
                try:
                    self._open()  # another process may have mended it
                    if self._execute("PRAGMA integrity_check(1)") != [("ok",)]:
                        raise sqlite3.DatabaseError("it is damaged")
                    as_records(self._execute(SELECT))
                except (sqlite3.Error, _ForeignError):
                    self._close()
                    for end in ("-wal", "-shm"):  # of the damaged one: no other file's
                        self.path.with_name(INDEX_NAME + end).unlink(missing_ok=True)
                    os.replace(self.path, self.path.with_suffix(".damaged"))
                    self._open()
        except (OSError, Timeout, sqlite3.Error, _ForeignError) as second:
            self._close()
            self._say(f"is damaged ({error}), and cannot be replaced ({second})", "Delete it.")

    def _explain(self, error: sqlite3.Error) -> None:
        if _kind(error) in READ_ONLY:
            return  # a disk to read from: nothing is wrong
        if _kind(error) in BUSY:
            self._say("is locked by another process", "End the program that holds it.")
        else:
            self._say(f"cannot be used ({error})", "The disk is full, or not made for databases.")

    def _say(self, what: str, cure: str) -> None:
        self._close()
        text = f"{self.path}: {what}. The runs' folders were read instead, which is slower. {cure}"
        warnings.warn(text, IndexWarning, stacklevel=_callers_level())

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _callers_level() -> int:
    """The `stacklevel`, for who calls this, of the first frame that is not the workbench's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("workbench."):
        frame, level = frame.f_back, level + 1
    return level


def _kind(error: sqlite3.Error) -> str:
    """SQLITE_BUSY and the like, without what comes behind it: SQLITE_BUSY_SNAPSHOT."""
    return "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors of SQLite as such, also where their text has bytes from a damaged file in it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise sqlite3.DatabaseError(f"its own texts are damaged: {error}") from None
