"""A committed folder is whole or not there, and tells when it was damaged."""

import os

import pytest

from workbench.errors import FileFormatError, RunError
from workbench.runs import commits
from workbench.runs.commits import MANIFEST_NAME, commit_folder, verify_folder


def writer(**files):
    return lambda folder: [(folder / name).write_text(text) for name, text in files.items()]


@pytest.fixture
def folder(tmp_path):
    return commit_folder(tmp_path, "step-1", writer(a="one", b="two"))


def test_commit_is_verified_and_leaves_nothing_else(folder, tmp_path):
    verify_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert (folder / "a").read_text() == "one"


def damage_content(folder):
    (folder / "a").write_text("onf")


def damage_length(folder):
    (folder / "a").write_text("one more")


def remove_file(folder):
    (folder / "b").unlink()


def add_file(folder):
    (folder / "c").write_text("")


def link_file(folder):
    (folder / "a").rename(folder.parent / "a")
    (folder / "a").symlink_to(folder.parent / "a")


def raise_version(folder):
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


def break_manifest(folder):
    (folder / MANIFEST_NAME).write_text("{")


DAMAGES = [
    damage_content,
    damage_length,
    remove_file,
    add_file,
    link_file,
    raise_version,
    break_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage, folder):
    damage(folder)
    with pytest.raises(FileFormatError, match=r"changed|hold|version|JSON"):
        verify_folder(folder)


def test_a_name_is_replaced_whole(folder, tmp_path):
    commit_folder(tmp_path, "step-1", writer(c="three"))
    verify_folder(folder)
    assert {path.name for path in folder.iterdir()} == {"c", MANIFEST_NAME}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("count", range(1, 7))
def test_a_failing_disk_leaves_the_earlier_folder(call, count, folder, tmp_path, monkeypatch):
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == count:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(commits.os, call, failing)
    try:
        commit_folder(tmp_path, "step-1", writer(a="new", b="new"))
    except RunError as error:
        assert "No space left" in str(error)  # noqa: PT017 (both ways are right)
    else:
        assert len(calls) < count
    verify_folder(folder)
    assert (folder / "a").read_text() in ("one", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        commit_folder(tmp_path, "step-1", write)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "root").write_text("")
    with pytest.raises(RunError, match="root"):
        commit_folder(tmp_path / "root", "step-1", writer(a="one"))
