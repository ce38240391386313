"""Sweeps with papermill and kernels: the command line, a killed trainer, a full disk, Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import workbench as wb
from tests.small_notebooks import processes_of, write_notebook
from tests.toy_training import toy_trainer
from workbench.commands import sweep as command
from workbench.errors import RunError
from workbench.runs.store import read_rows

ROOT = Path(__file__).parent.parent
SETTINGS = {"epochs": 6, "checkpoint_every": 2, "dropout": 0.2}
TRAIN = f"""import os, pathlib, signal
import workbench
from tests.toy_training import toy_trainer
trainer = toy_trainer(run_dir=run_dir, learning_rate=rate, **{SETTINGS})
first = not pathlib.Path(run_dir, 'killed').exists()
print('starts after step', trainer.steps_done)
for report in trainer:
    if first and report.step == 5:
        pathlib.Path(run_dir, 'killed').touch()
        os.kill(os.getpid(), signal.SIGKILL)"""


def options_of(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(shlex.split(line))


def test_the_command_runs_all_and_the_summary_tells_what_failed(tmp_path, capsys):
    cells = ["import json, pathlib", "share = a / b"]
    keep = "pathlib.Path(run_dir, 'results.json').write_text(json.dumps({'share': share}))"
    notebook = write_notebook(tmp_path / "x.ipynb", "a = 1\nb = 1\nrun_dir = ''", *cells, keep)
    root = tmp_path / "out"
    line = f"{notebook} -g a 3 -g b 0,2 --root {root} --at-once 2 --memory 0.1 --retries 0"
    assert command.run(options_of(line)) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"2 runs in {root}, 0 finished before"
    assert any("finished  a=3, b=2" in line and "share 1.5" in line for line in printed)
    assert any("failed    a=3, b=0" in line and "ZeroDivisionError" in line for line in printed)
    swept = wb.read_sweep(root)
    assert swept.table.state.tolist() == ["failed", "finished"]
    assert swept.failures[0].result.cell == 4
    ran = swept.table[swept.table.state == "finished"]
    assert (ran.overhead_seconds > 0).all(), "a kernel's start takes time"
    assert (ran.overhead_seconds < ran.seconds).all(), "the cells' own time is not in it"
    cells = nbformat.read(swept.summary, as_version=4).cells
    text = json.dumps([cell.get("outputs", cell.source) for cell in cells])
    for wanted in ("1 failed", "share = a / b", "ZeroDivisionError: division by zero", "1.5"):
        assert wanted in text


def test_a_trainer_killed_in_mid_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = write_notebook(tmp_path / "train.ipynb", "rate = 0.0\nrun_dir = ''", TRAIN)
    swept = wb.sweep(notebook, {"rate": [1e-2]}, tmp_path / "out", summary=False)
    (run,) = swept.runs
    assert (run.state, run.attempts) == ("finished", 2)
    log = (run.folder / "log.txt").read_text()
    assert "starts after step 4" in log, "it goes on from the checkpoint"
    unbroken = toy_trainer(learning_rate=1e-2, **SETTINGS)
    losses = [report.loss for report in unbroken]
    assert [row["loss"] for row in read_rows(run.folder, "metrics.jsonl")] == losses
    assert swept.table["loss"][0] == losses[-1]


def test_a_notebook_that_wrote_files_before_it_failed_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [
        "import pathlib\nnotes = pathlib.Path(run_dir, 'notes.txt')",
        "first = not notes.exists()\nnotes.write_text('mine')\nassert not first",
        "from tests.toy_training import toy_trainer",
        "for report in toy_trainer(run_dir=run_dir, steps=2): pass",
    ]
    notebook = write_notebook(tmp_path / "notes.ipynb", "a = 1\nrun_dir = ''", *cells)
    (run,) = wb.sweep(notebook, {"a": [1]}, tmp_path / "out", summary=False).runs
    assert (run.state, run.attempts) == ("finished", 2), run.result
    assert len(read_rows(run.folder, "metrics.jsonl")) == 2
    assert (run.folder / "notes.txt").read_text() == "mine"


@pytest.mark.long
def test_a_job_whose_file_cannot_grow_stops_the_sweep_and_it_goes_on_later(tmp_path):
    cell = "print('x' * length)"
    notebook = write_notebook(tmp_path / "wide.ipynb", "length = 1", cell)
    grid, root = {"length": [3_000_000]}, tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(RunError, match=r"File too large.*Free some space"):
            wb.sweep(notebook, grid, root, summary=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (run,) = wb.read_sweep(root).runs
    assert run.state == "running", "as a crash leaves it: it starts again"
    assert not (run.folder / "notebook.ipynb").exists()
    (run,) = wb.sweep(notebook, grid, root, summary=False).runs
    assert run.state == "finished"


@pytest.mark.long
def test_ctrl_c_ends_the_kernels_and_leaves_what_can_go_on(tmp_path):
    notebook = write_notebook(
        tmp_path / "sleep.ipynb",
        "a = 1\nrun_dir = ''",
        "open(run_dir + '/begun', 'w')\nimport time; time.sleep(300)",
    )
    root = tmp_path / "out"
    code = (  # a shell that runs the tests in the background has Ctrl-C ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import tests.test_sweep_engines as t; t.command.run(t.options_of(sys.argv[1]))"
    )
    line = f"{notebook} -g a 1,2 --root {root} --at-once 2 --memory 0.1"
    process = subprocess.Popen([sys.executable, "-c", code, line], cwd=ROOT, env=os.environ)
    deadline = time.monotonic() + 100
    while len(list(root.glob("*/begun"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    assert processes_of(root) == []
    assert [run.state for run in wb.read_sweep(root).runs] == ["cancelled"] * 2
