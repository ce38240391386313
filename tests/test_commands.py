"""The command line: what it lists, which errors it shows how, and its exit statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

import workbench.commands
from tests.toy_runs import toy_run
from workbench.__main__ import COMMANDS, main
from workbench.errors import IndexWarning, RunError

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(Path(workbench.commands.__file__).parent.glob("[!_]*.py"))
THERE = [path.stem for path in FILES if "def add_arguments" in path.read_text(encoding="utf-8")]


@pytest.fixture
def command(monkeypatch):
    """Put a command that calls a function in the list."""

    def put(function):
        module = types.ModuleType("workbench.commands.tried", "Tried.")
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int)
        module.run = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "tried", "calls a function")

    return put


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_command_all_are_listed(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown and what in shown for name, what in COMMANDS.items())


def test_every_command_is_listed():
    assert set(THERE) <= set(COMMANDS)


@pytest.mark.parametrize("name", THERE)
def test_a_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([name, "--help"])
    assert leaving.value.code == 0
    assert f"python -m workbench {name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["runs", "--root", "."], ["runs", "--help"], ["--help"]])
def test_a_terminal_of_ascii_gets_question_marks(words, tmp_path):
    toy_run(tmp_path / "run", 0)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "workbench", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout
    assert done.stdout.isascii()


def test_an_unknown_command_is_refused_and_a_like_one_named(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["docter\x1b[31m", "--fetch"])
    shown = capsys.readouterr().err
    assert leaving.value.code == 2
    assert "no command 'docter\\\\x1b[31m'" in shown
    assert "\x1b" not in shown
    with pytest.raises(SystemExit):
        main(["docter"])
    assert "did you mean doctor?" in capsys.readouterr().err


def test_a_command_gets_its_options_and_gives_the_status(command):
    seen = []
    command(lambda options: seen.append(options.number) or 7)
    assert main(["tried", "--number", "3"]) == 7
    assert seen == [3]


def test_a_users_error_is_one_line(command, capsys):
    def fail(options):
        raise RunError("is\nno \x1b[31m run", where="here", cure="Give another.")

    command(fail)
    assert main(["tried"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "tried: here: is no \\x1b[31m run. Give another.\n"
    assert shown.out == ""


def test_a_warning_is_one_line_without_our_source(command, capsys):
    command(lambda options: warnings.warn("the index is\nlocked", IndexWarning, stacklevel=2) or 0)
    before = warnings.showwarning
    assert main(["tried"]) == 0
    assert capsys.readouterr().err == "tried: the index is locked\n"
    assert warnings.showwarning is before


def test_an_error_of_ours_is_not_hidden(command):
    command(lambda options: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["tried"])


def doctor_after_its_first_line():
    """A doctor at work, in a process group of its own as behind a terminal."""
    command = [sys.executable, "-m", "workbench", "doctor"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    assert "Python" in process.stdout.readline()
    return process


def test_ctrl_c_ends_a_command_without_a_traceback():
    process = doctor_after_its_first_line()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")


def test_a_closed_pipe_ends_a_command_without_a_traceback():
    process = doctor_after_its_first_line()
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == ""
