"""A run is deleted whole or not at all, and never while somebody writes it."""

from __future__ import annotations

import os
import signal

import pytest

from tests.process import finish, run, start
from tests.toy_runs import toy_run, write_job
from workbench.errors import RunError
from workbench.runs import deleting, lock
from workbench.runs.deleting import delete_run
from workbench.runs.store import RunFolder
from workbench.runs.table import runs

HOLD = """
    from workbench.runs.store import RunFolder
    folder = RunFolder({folder!r}, {{}})
    print("held", flush=True)
    import time
    time.sleep(60)
"""
KILLED = """
    import os, shutil, signal
    from workbench.runs import deleting
    def remove_one(folder, **rest):
        os.unlink(folder / "config.json")
        os.kill(os.getpid(), signal.SIGKILL)
    shutil.rmtree = remove_one
    deleting.delete_run({folder!r})
"""


def test_a_run_is_deleted_with_all_that_is_in_it(tmp_path):
    for name in "ab":
        folder = toy_run(tmp_path / name)
        (folder / "checkpoints" / "step-3").mkdir(parents=True)
        (folder / "checkpoints" / "step-3" / "x").write_text("x")
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "kept.txt")
    assert len(runs(tmp_path)) == 2
    delete_run(tmp_path / "a")
    assert runs(tmp_path).name.tolist() == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "index.sqlite", "kept.txt"]
    RunFolder(toy_run(tmp_path / "a"), {}).append({"step": 4})  # its lock is free


def test_what_is_no_run_is_refused(tmp_path):
    toy_run(tmp_path / "runs" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "a", target_is_directory=True)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    for folder, says in (
        (tmp_path / "link", "is a link"),
        (tmp_path / "runs", "holds no run"),
        (model, "holds no run"),
        (model / "config.json", "is no folder"),
        (tmp_path / "nowhere", "is no folder"),
    ):
        with pytest.raises(RunError, match=says):
            delete_run(folder)
    assert (model / "model.safetensors").exists()
    assert runs(tmp_path / "runs").state.tolist() == ["finished"]


def test_a_run_of_this_process_is_refused_until_it_is_let_go(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    with pytest.raises(RunError, match=r"is being written.*del trainer"):
        delete_run(tmp_path / "run")
    folder.append({"step": 1})
    del folder
    delete_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_process_is_refused(tmp_path):
    process = start(HOLD.format(folder=str(tmp_path / "run")))
    assert process.stdout.readline() == "held\n"
    try:
        with pytest.raises(RunError, match="is being written"):
            delete_run(tmp_path / "run")
    finally:
        process.kill()
        finish(process)
    delete_run(tmp_path / "run")


def test_a_notebook_of_a_sweep_that_runs_is_refused(tmp_path):
    write_job(tmp_path / "run", "running")
    attempt = tmp_path / "run" / ".job"
    attempt.mkdir()
    lock.take(attempt, holder := type("Holder", (), {})())
    assert runs(tmp_path).state.tolist() == ["running"]
    with pytest.raises(RunError, match="is being written"):
        delete_run(tmp_path / "run")
    del holder
    delete_run(tmp_path / "run")


@pytest.mark.long
def test_a_kill_leaves_no_half_run_and_the_next_call_clears_up(tmp_path):
    toy_run(tmp_path / "a"), toy_run(tmp_path / "b")
    killed = run(KILLED.format(folder=str(tmp_path / "a")))
    assert killed.code == -signal.SIGKILL, killed.err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(deleting.TRASH)]
    assert runs(tmp_path).name.tolist() == ["b"]
    delete_run(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["index.sqlite"]


def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch):
    toy_run(tmp_path / "run")
    monkeypatch.setattr(deleting.shutil, "rmtree", lambda *_, **rest: None)
    with pytest.raises(RunError, match="could not be removed wholly"):
        delete_run(tmp_path / "run")
    assert runs(tmp_path).empty
