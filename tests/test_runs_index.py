"""The index of the runs is a memory that may fail: the table is whole all the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import stat
import warnings
import zlib

import pandas as pd
import pytest

from tests.process import finish, run, start
from tests.toy_runs import toy_run
from workbench.errors import IndexWarning
from workbench.runs import index
from workbench.runs.index import INDEX_NAME
from workbench.runs.table import compare_configs, runs

NAMES = ["a", "b", "c"]
APPEND = """
    import sys
    from workbench.runs.store import RunFolder
    folder = RunFolder({folder!r}, {{"writer": {number}}})
    for step in range(1, {steps} + 1):
        row = {{"step": step, "total_steps": {steps}, "loss": 1 / step, "step_seconds": 1.0}}
        folder.append(row)
"""
LIST = """
    import time, warnings
    warnings.simplefilter("error")
    from workbench.runs.table import runs
    seen, deadline = 0, time.monotonic() + 240
    while seen < {total} and time.monotonic() < deadline:
        table = runs({root!r})
        assert table.problem.tolist() == [""] * len(table), table.problem.tolist()
        assert table.steps.sum() >= seen, "steps were lost"
        assert (table.seconds.fillna(0) == table.steps).all(), "a row counts twice, or not at all"
        seen = table.steps.sum()
    print(seen)
"""
KILLED = """
    import os, signal
    from workbench.runs import index
    index.BATCH, own, left = 2, index.Index._change, [3]
    def change(self, sql, rows):
        own(self, sql, rows)
        left[0] -= bool(rows)
        if not left[0]:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(sql, [("torn", *row[1:]) for row in rows])
            os.kill(os.getpid(), signal.SIGKILL)
    index.Index._change = change
    from workbench.runs.table import runs
    runs({root!r})
"""


@pytest.fixture
def root(tmp_path):
    """A folder with three runs and their index."""
    for number, name in enumerate(NAMES, 1):
        toy_run(tmp_path / name, number)
    runs(tmp_path)
    return tmp_path


def is_whole(root):
    """The table has the three runs with their steps."""
    return runs(root)[["name", "steps"]].to_numpy().tolist() == [["a", 1], ["b", 2], ["c", 3]]


def is_known(root):
    """Whether the index alone says the same."""
    table = runs(root, refresh=False)
    with sqlite3.connect(root / INDEX_NAME) as connection:
        rows = connection.execute("SELECT name, steps FROM run ORDER BY name").fetchall()
    return list(table[["name", "steps"]].itertuples(index=False, name=None)) == rows != []


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_a_truncated_index_is_made_anew(root, share):
    path = root / INDEX_NAME
    os.truncate(path, int(share * path.stat().st_size))
    assert is_whole(root)
    assert is_known(root)


@pytest.mark.fault("index of the runs")
def test_a_lost_index_is_made_anew(root):
    (root / INDEX_NAME).unlink()
    assert is_whole(root)
    assert is_known(root)


@pytest.mark.fault("index of the runs")
def test_what_is_no_index_is_moved_aside(root):
    (root / INDEX_NAME).write_bytes(b"not a database at all, but somebody's notes\n" * 200)
    assert is_whole(root)
    assert is_known(root)
    assert (root / "index.damaged").read_bytes().startswith(b"not a database")


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize("place", range(0, 24_000, 2000))
def test_flipped_bytes_never_spoil_the_table(root, place):
    before, path = runs(root), root / INDEX_NAME
    content = bytearray(path.read_bytes())
    for at in range(place, min(place + 300, len(content))):
        content[at] ^= 0x5A
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IndexWarning)
        pd.testing.assert_frame_equal(runs(root), before)
    toy_run(root / "d", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IndexWarning)
        assert len(runs(root)) == 4
        warnings.simplefilter("error")
        assert len(runs(root)) == 4  # it has been mended


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_never_spoils_the_table(root, seed):
    before, path, source = runs(root), root / INDEX_NAME, random.Random(seed)
    content = path.read_bytes()
    filled = [at for at, byte in enumerate(content) if byte]
    for at in source.sample(filled, 50):
        damaged = bytearray(content)
        damaged[at] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IndexWarning)
            pd.testing.assert_frame_equal(runs(root), before)


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"adamw"', b'"ad\xc2mw"'),
        (b'"adamw"', b'"muonx"'),
        (b"tablerunrun", b"tabler\xc2nrun"),
        (b"CREATE TABLE run", b"CREATE T\xc2BLE run"),
        (b"CREATE TABLE run (name", b"CREATE TABLE r\xc2n  name"),
    ],
)
def test_damaged_texts_of_the_index_are_made_anew(root, old, new):
    before, path = runs(root), root / INDEX_NAME
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.testing.assert_frame_equal(runs(root), before)
    assert is_known(root)


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize(
    "change",
    [
        "PRAGMA application_id = 7",
        "UPDATE run SET steps = 'many', loss = x'00', name = x'ff' WHERE name = 'a'",
        "UPDATE run SET started = 1e163",
        "UPDATE run SET loss = 0.001, steps = 7",
        "UPDATE run SET names = '[1]'",
        "UPDATE run SET values_ = '[[1], [2]]'",
        "UPDATE run SET values_ = values_ || ', []'",
        "UPDATE run SET values_ = '" + "[" * 100_000 + "'",
        "UPDATE run SET digest = '{\"offset\": \"x\"}', stamp = ''",
        "UPDATE run SET digest = '{\"offset\": -5}', stamp = ''",
        "DROP TABLE run",
        "ALTER TABLE run ADD COLUMN more",
        "CREATE TRIGGER t AFTER INSERT ON run BEGIN DELETE FROM run; END",
        "PRAGMA user_version = 0",
    ],
)
def test_an_index_of_other_content_does_no_harm(root, change):
    with sqlite3.connect(root / INDEX_NAME) as connection:
        connection.execute(change)
    connection.close()
    if "application_id" in change:
        with pytest.warns(IndexWarning, match="another program's database"):
            assert is_whole(root)
        return
    assert is_whole(root)
    toy_run(root / "d", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs(root).steps.tolist() == [1, 2, 3, 4]
    assert is_known(root)


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize(
    "change", [{"started": 1e163}, {"started": -1.0}, {"names": "[1]"}, {"values_": "[[1]]"}]
)
def test_a_row_of_other_values_does_no_harm_though_its_checksum_fits(root, change):
    before = runs(root)
    with sqlite3.connect(root / INDEX_NAME) as connection:
        connection.row_factory = sqlite3.Row
        row = dict(connection.execute("SELECT * FROM run WHERE name = 'b'").fetchone()) | change
        values = list(row.values())[:-1]
        values.append(zlib.crc32(ascii(tuple(values)).encode()))
        connection.execute(f"REPLACE INTO run VALUES ({','.join('?' * len(values))})", values)
    connection.close()
    pd.testing.assert_frame_equal(runs(root), before)


@pytest.mark.fault("index of the runs")
def test_another_programs_database_is_left_alone(root):
    path = root / INDEX_NAME
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (place)")
        connection.execute("INSERT INTO bookmarks VALUES ('mine')")
    connection.close()
    before = path.read_bytes()
    with pytest.warns(IndexWarning, match="another program's database"):
        assert is_whole(root)
    assert path.read_bytes() == before


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_file_is_left_alone(root, make):
    path = root / INDEX_NAME
    path.unlink()
    make(path)
    for ask in (runs, compare_configs):
        with pytest.warns(IndexWarning, match="not a regular file") as caught:
            assert len(ask(root)) == 3
        assert {warning.filename for warning in caught} == {__file__}
    assert not stat.S_ISREG(os.lstat(path).st_mode)
    assert not (root / "elsewhere").exists()


@pytest.mark.fault("index of the runs")
@pytest.mark.parametrize("kept", ["BEGIN IMMEDIATE", "PRAGMA locking_mode = EXCLUSIVE"])
def test_a_locked_index_is_waited_for_and_done_without(root, kept, monkeypatch):
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.3)
    toy_run(root / "d", 4)
    holder = sqlite3.connect(root / INDEX_NAME, isolation_level=None)
    holder.execute("PRAGMA journal_mode = DELETE" if "EXCLUSIVE" in kept else "PRAGMA user_version")
    holder.execute(kept)
    if "EXCLUSIVE" in kept:
        holder.execute("BEGIN EXCLUSIVE")
    with pytest.warns(
        IndexWarning, match=r"index\.sqlite: is locked by another process.*End the"
    ) as caught:
        assert runs(root).steps.tolist() == [1, 2, 3, 4]
    assert {warning.filename for warning in caught} == {__file__}
    holder.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs(root).steps.tolist() == [1, 2, 3, 4]
    assert len(runs(root, refresh=False)) == 4


def test_no_file_is_left_beside_the_index(root):
    assert sorted(p.name for p in root.iterdir() if p.is_file()) == [INDEX_NAME]


@pytest.mark.fault("index of the runs")
def test_a_refresh_that_is_killed_leaves_a_whole_index(tmp_path):
    for number in range(9):
        toy_run(tmp_path / f"run-{number}", number)
    killed = run(KILLED.format(root=str(tmp_path)))
    assert killed.code == -signal.SIGKILL, killed.err
    with sqlite3.connect(tmp_path / INDEX_NAME) as connection:
        assert len(connection.execute("SELECT name FROM run").fetchall()) == 6
    connection.close()
    assert runs(tmp_path).steps.tolist() == list(range(9))
    assert runs(tmp_path, refresh=False).steps.tolist() == list(range(9))


def test_an_index_that_is_replaced_knows_nothing_of_others(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    toy_run(other / "a", 7)
    shutil.copy(root / INDEX_NAME, other)
    assert runs(other).steps.tolist() == [7]


def writers_and_readers(tmp_path, writers, steps, readers):
    """Processes that append, while others list; every step must come to be seen."""
    root, total = tmp_path / "runs", writers * steps
    root.mkdir()
    listing = [start(LIST.format(root=str(root), total=total)) for _ in range(readers)]
    writing = [
        start(APPEND.format(folder=str(root / f"w{number}"), number=number, steps=steps))
        for number in range(writers)
    ]
    for process in [*writing, *listing]:
        finished = finish(process, 300)
        assert finished.code == 0, finished.err
        assert finished.out in ("", str(total))
    table = runs(root)
    assert table.steps.tolist() == [steps] * writers
    assert table.state.tolist() == ["finished"] * writers
    pd.testing.assert_frame_equal(runs(root, refresh=False), table)


def test_nothing_is_lost_while_some_write_and_others_list(tmp_path):
    writers_and_readers(tmp_path, writers=2, steps=300, readers=2)


@pytest.mark.long
def test_nothing_is_lost_with_eight_writers_of_a_thousand_steps(tmp_path):
    writers_and_readers(tmp_path, writers=8, steps=1000, readers=2)
