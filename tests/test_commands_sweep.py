"""What the command `sweep` makes of its options."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.small_notebooks import write_notebook
from tests.test_sweep import FINISHED, Quick
from tests.test_sweep_engines import options_of
from workbench.commands import sweep as command
from workbench.errors import ConfigError
from workbench.runs.sweep_result import read_sweep


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Runs the command without kernels; the parameters of its runs."""
    notebook = write_notebook(tmp_path / "x.ipynb", "a = 1\nb = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "write_summary", lambda root: root / "summary.ipynb")

    def call(line):
        options = options_of(f"{notebook} --root out {line}")
        options.executor = Quick()
        assert command.run(options) == 0
        return [run.parameters for run in read_sweep(tmp_path / "out").runs]

    return call


def test_a_range_is_drawn(swept):
    found = swept("-g b x,y --between a 3 9 --samples 5")
    assert len(found) == 5
    assert {run["b"] for run in found} <= {"x", "y"}
    assert all(type(run["a"]) is int and 3 <= run["a"] <= 9 for run in found)


def test_a_range_of_logarithms_is_drawn_alone(swept):
    found = [run["a"] for run in swept("--log-between a 1e-8 1e-2 --samples 40")]
    assert all(1e-8 <= value <= 1e-2 for value in found)
    assert 10 < sum(value < 1e-5 for value in found) < 30


def test_a_list_is_read(swept, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"runs": [{"a": 1}, {"b": 2}]}))
    assert swept("--list list.json") == [{"a": 1}, {"b": 2}]


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "x.ipynb", "a = 1")
    options = options_of(f"{notebook} --root {tmp_path / 'out'} -g a 1,2,3")
    options.executor = Quick(lambda job: os.kill(os.getpid(), signal.SIGINT) or FINISHED)
    with pytest.raises(KeyboardInterrupt):
        command.run(options)
    assert capsys.readouterr().err == "stopped: the same command goes on with what is left\n"
    assert options.executor.cancelled.is_set()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "give either parameters or a list"),
        ("-g a 1 --list list.json", "give either parameters or a list"),
        ("--between a 1 2 --list list.json", "give either parameters or a list"),
        ("-g a 1 -g a 2", "a is there twice"),
        ("-g a 1 --between a 1 2 --samples 1", "a is there twice"),
        ("-g a ' Between(1e-4,1e-2)'", "Use --between a LOW HIGH"),
        ("--between a x 2 --samples 1", "low of Between must be a number"),
        ("--log-between a 0 2 --samples 1", "both above 0"),
        ("--between a 1 2", "a is drawn"),
        ("-g a 1 --memory nan", "--memory must be a number"),
        ("-g a 1 --memory inf", "--memory must be a number"),
        ("-g a 1 --memory -1", "--memory must be a number"),
        ("-g a 1 --memory 0", "must be a whole number from 1"),
    ],
)
def test_what_cannot_be_run_is_named(swept, tmp_path, line, problem):
    with pytest.raises(ConfigError, match=problem):
        swept(line)
    assert not (tmp_path / "out").exists()
