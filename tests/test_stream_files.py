"""Files of a stream: found, refused, and known again when a run goes on."""

from __future__ import annotations

import copy
import gzip
import os
import shutil

import pytest

from tests.toy_streams import lines_of, numbered, numbers, one_pass, toy_feed, write_files
from workbench.data.stream_files import GZIP, HEAD_BYTES, find_files
from workbench.errors import DataError, RunError

GOOD = b'{"text": "fine"}\n'


def names(source):
    return [file.path.name for file in find_files(source)]


def test_files_are_found_by_path_folder_pattern_and_list(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "valid.jsonl", "test.jsonl.gz", "notes.txt", "c.json"):
        (tmp_path / name).write_bytes(gzip.compress(GOOD) if name.endswith(".gz") else GOOD)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_bytes(GOOD)
    assert names(tmp_path) == names(str(tmp_path)) == ["a.jsonl.gz", "b.jsonl"]
    assert names(tmp_path / "c.json") == ["c.json"]
    assert names(f"{tmp_path}/*.jsonl") == ["b.jsonl", "valid.jsonl"]
    assert names(f"{tmp_path}/**/d*") == ["d.jsonl"]
    assert names([tmp_path / "b.jsonl", tmp_path / "deep"]) == ["b.jsonl", "d.jsonl"]


def test_a_folder_keeps_back_the_parts_of_what_is_held_out(tmp_path):
    parts = ("validation-00000-of-00001.jsonl", "test-00001-of-00002.jsonl.gz", "valid.1.jsonl")
    parts += ("val.jsonl", "dev.jsonl.gz", "eval-00000-of-00001.jsonl", "Test.jsonl", "VALID.jsonl")
    rows = ("development.jsonl", "evaluated.jsonl", "test-cases.jsonl", "tests.jsonl")
    rows += ("train-00000-of-00001.jsonl", "validity.jsonl", "values.jsonl")
    for name in parts + rows:
        (tmp_path / name).write_bytes(GOOD)
    assert names(tmp_path) == [*rows]


def test_a_name_with_brackets_is_no_pattern_where_the_file_is_there(tmp_path):
    (tmp_path / "rows[1].jsonl").write_bytes(GOOD)
    assert names(tmp_path / "rows[1].jsonl") == ["rows[1].jsonl"]


def test_what_names_no_files_is_refused(tmp_path):
    (tmp_path / "valid.jsonl").write_bytes(GOOD)
    for source, says in [
        (tmp_path, "holds no .* to train on"),
        (tmp_path / "rows.jsonl", r"rows\.jsonl: cannot be read \(No such file"),
        (f"{tmp_path}/*.gz", "no file has such a name"),
        ([], "no files are named"),
        (3, "rows cannot be streamed from a int"),
        ([{"text": "a"}], "rows cannot be streamed from a dict"),
        (None, "rows cannot be streamed from a NoneType"),
        ("a\0b", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=says):
            find_files(source)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "A.JSONL.GZ"])
def test_a_name_of_gzip_whose_file_is_none_is_refused(name, tmp_path):
    path, packed = tmp_path / name, gzip.compress(GOOD)
    for content, says in [
        (b"", r"cut short \(0 bytes\)"),
        (packed[:1], r"cut short \(1 bytes\)"),
        (GOOD, r"is no gzip file"),
        (b"\0" * 50, r"is no gzip file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: .*{says}"):
            find_files([path])
    for cut in range(2, len(packed)):  # from here on, reading tells
        path.write_bytes(packed[:cut])
        with pytest.raises(DataError, match="gzip file is damaged or cut short"):
            toy_feed([path]).batches(0)
    path.write_bytes(packed)
    assert find_files([path])[0].is_gzip


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_named_twice_is_refused(link, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: is named twice"):
        find_files(tmp_path)


@pytest.mark.parametrize("kind", ["link out", "pipe", "folder"])
def test_what_is_no_file_of_its_folder_is_refused(kind, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "rows.jsonl"
    (tmp_path / "outside.jsonl").write_bytes(GOOD)
    if kind == "link out":
        path.symlink_to("../outside.jsonl")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(DataError, match=r"rows\.jsonl: is"):
        find_files(folder)


def started(folder, batch_size=1):
    """The place of a feed in the middle of its second file of three."""
    feed = toy_feed(folder, batch_size)
    for step in range(40):
        feed.batches(step)
    return feed.state(40)


def one_byte(path, place):
    """Change a byte of a file's content, or mend it."""
    content = path.read_bytes()
    packed = content.startswith(GZIP)
    plain = bytearray(gzip.decompress(content) if packed else content)
    plain[place] ^= 1
    path.write_bytes(gzip.compress(plain, 0, mtime=0) if packed else plain)
    assert path.stat().st_size == len(content)


@pytest.fixture(params=["plain", "gzip"])
def folder(request, tmp_path):
    """Three files of thirty rows."""
    return write_files(tmp_path / "data", request.param, (30, 30, 30))


def grow(path):
    content = lines_of(numbered(1))
    packed = path.read_bytes().startswith(GZIP)
    with path.open("ab") as file:
        file.write(gzip.compress(content) if packed else content)


CHANGES = {
    "longer": grow,
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "other": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "gone": os.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_is_named(change, folder):
    state, paths = started(folder), sorted(folder.iterdir())
    for path in paths:
        kept = path.read_bytes()
        left = toy_feed(folder, 1)
        CHANGES[change](path)
        if change != "gone":
            with pytest.raises(RunError, match=f"{path.name}: was changed since"):
                toy_feed(folder, 1).restore(state, 40)
        with pytest.raises(RunError, match=path.name):
            one_pass(left)
        path.write_bytes(kept)
    toy_feed(folder, 1).restore(state, 40)  # as they were


def long_files(folder, form):
    """Files whose rows lie behind the head by which a file is known."""
    folder.mkdir()
    for number in range(2):
        content = b" " * HEAD_BYTES + b"\n" + lines_of(numbered(200, 200 * number))
        if form == "gzip":  # stored, so that a changed byte changes neither size nor head
            content = gzip.compress(content, 0, mtime=0)
        (folder / f"{number}.jsonl").write_bytes(content)
    return folder


@pytest.mark.parametrize("where", ["in the part read", "in a row that waits"])
@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_a_byte_that_was_changed_behind_the_head_is_noticed(where, form, tmp_path):
    folder = long_files(tmp_path / "data", form)
    feed = toy_feed(folder, 1, buffer_rows=5)
    for step in range(40):  # the file's first rows were used: only its sum can tell
        feed.batches(step)
    state = feed.state(40)
    file, offset, *_ = (column[0] for column in state["buffer"])
    path = sorted(folder.iterdir())[file]
    place = offset + 12 if where == "in a row that waits" else HEAD_BYTES + 14
    one_byte(path, place)
    with pytest.raises(RunError, match=f"{path.name}: was changed since the run began"):
        toy_feed(folder, 1, buffer_rows=5).restore(state, 40)
    one_byte(path, place)
    toy_feed(folder, 1, buffer_rows=5).restore(state, 40)


def test_a_byte_that_was_changed_between_two_passes_is_noticed(tmp_path):
    folder = long_files(tmp_path / "data", "plain")
    feed = toy_feed(folder, 1)
    _, step = one_pass(feed)
    mark = feed.mark()
    place = (folder / "0.jsonl").read_bytes().rindex(b"x")
    one_byte(folder / "0.jsonl", place)
    with pytest.raises(RunError, match=r"0\.jsonl: was changed since the pass before"):
        one_pass(feed, step)
    one_byte(folder / "0.jsonl", place)
    feed.go_back(mark)
    assert sorted(numbers(one_pass(feed, step)[0])) == list(range(400))


@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_a_file_that_grows_while_it_is_read_is_noticed_at_its_end(form, tmp_path):
    feed = toy_feed(long_files(tmp_path / "data", form), 1)
    feed.batches(0)
    path = feed._reader._lines.file.path
    grow(path)
    with pytest.raises(RunError, match=f"{path.name}: was changed since the run began"):
        numbers([feed.batches(step) for step in range(400)])


def test_other_files_are_told_apart(folder, tmp_path):
    state = started(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    toy_feed(moved, 1).restore(state, 40)
    last = sorted(moved.iterdir())[-1]
    last.rename(last.with_name("zebra.jsonl"))
    with pytest.raises(RunError, match=r"zebra\.jsonl: the run read 'part-2"):
        toy_feed(moved, 1).restore(state, 40)
    (moved / "zebra.jsonl").unlink()
    with pytest.raises(RunError, match="holds a run over 3 files, the stream has 2"):
        toy_feed(moved, 1).restore(state, 40, "here")


HOSTILE = {
    "nothing": lambda state: state.clear(),
    "no files": lambda state: state.update(files=None),
    "files of one column": lambda state: state.update(files=[["part-0.jsonl"]]),
    "a negative place": lambda state: state.update(place=-1),
    "a place beyond the files": lambda state: state.update(place=4),
    "a fraction": lambda state: state.update(epoch=0.5),
    "a truth value": lambda state: state.update(window=True),
    "an enormous offset": lambda state: state.update(offset=10**40),
    "sums of other files": lambda state: state["sums"].append(3),
    "a sum that is a text": lambda state: state["sums"].__setitem__(0, "3"),
    "a bad line of two": lambda state: state.update(bad=[["a", 3]]),
    "sizes that do not add up": lambda state: state["sizes"].append(1),
    "an empty micro-batch": lambda state: state["sizes"].append(0),
    "a buffer of texts": lambda state: state.update(buffer=[["a"]] * 4),
    "a buffer of three columns": lambda state: state["buffer"].pop(),
    "ragged columns": lambda state: state["buffer"][1].pop(),
    "empty columns": lambda state: state.update(buffer=[[], [], [], []]),
    "a file beyond the files": lambda state: state["ready"][0].__setitem__(0, 3),
    "a row at another place": lambda state: state["ready"][1].__setitem__(0, 10**12),
    "a row of another sum": lambda state: state["ready"][3].__setitem__(0, 1),
    "another offset": lambda state: state.update(offset=state["offset"] + 3),
    "an offset behind the end": lambda state: state.update(offset=10**9),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_state_that_is_none_is_refused_and_changes_nothing(name, folder):
    state = started(folder)
    assert 0 < state["place"] < 3
    spoilt = copy.deepcopy(state)
    HOSTILE[name](spoilt)
    feed = toy_feed(folder, 1)
    expected = numbers([toy_feed(folder, 1).batches(0)])
    with pytest.raises(RunError):
        feed.restore(spoilt, 40)
    assert numbers([feed.batches(0)]) == expected
