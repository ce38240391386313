"""The supervisor of ranks: whatever goes wrong is named, and no process is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from contextlib import contextmanager, suppress

import nbformat
import psutil
import pytest

from tests.process import ROOT
from tests.toy import save_toy_folder
from workbench.commands import launch
from workbench.errors import ConfigError, RankError
from workbench.runs.hosts import find_ports
from workbench.runs.launching import Limits, run_ranks
from workbench.runs.store import read_rows

LAUNCHER = "import sys; from tests.test_launching import supervise; supervise(*sys.argv[1:])"


def job(name: str, folder):
    """Gives the command of a rank in tests/rank_jobs.py."""
    return lambda rank: [sys.executable, "-m", "tests.rank_jobs", name, str(folder)]


def supervise(name: str, folder: str) -> None:
    """What a supervisor's process of its own does."""
    from pathlib import Path

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background
    run_ranks(job(name, folder), 2, Path(folder) / "logs", Limits(180, 120))


def own_processes(folder) -> list[psutil.Process]:
    """Those that have the test's folder in their command."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextmanager
def nothing_left(folder):
    """Fails if a process of the test still runs afterwards."""
    yield
    until = time.time() + 10
    while own_processes(folder) and time.time() < until:
        time.sleep(0.1)
    left = own_processes(folder)
    for process in left:
        process.kill()
    assert left == []


def wait_for(*paths, seconds=120) -> None:
    """Until the files are there, with something in them."""
    until = time.time() + seconds
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.time() < until, f"{paths} did not come"
        time.sleep(0.05)


def start_supervisor(name, folder) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, name, str(folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_rank_is_named_and_the_other_ended(tmp_path):
    threading.Thread(target=_kill_when_going, args=(tmp_path,), daemon=True).start()
    with nothing_left(tmp_path), pytest.raises(RankError) as caught:
        run_ranks(job("forever", tmp_path), 2, tmp_path / "logs", Limits(180, 120))
    assert "rank 1 was killed by SIGKILL" in str(caught.value)
    assert caught.value.status == 128 + signal.SIGKILL
    assert len(read_rows(tmp_path / "run", "metrics.jsonl")) >= 3


def _kill_when_going(folder) -> None:
    wait_for(folder / "going-0", folder / "going-1")
    os.kill(int((folder / "going-1").read_text()), signal.SIGKILL)


@pytest.mark.long
def test_a_failing_rank_is_named_with_its_last_words(tmp_path):
    with nothing_left(tmp_path), pytest.raises(RankError) as caught:
        run_ranks(job("broken", tmp_path), 2, tmp_path / "logs", Limits(180, 120))
    assert "rank 1 ended with status 1" in str(caught.value)
    assert "RuntimeError: planted" in str(caught.value)
    assert caught.value.status == 1


def test_a_rank_that_has_ended_in_order_is_named_when_another_fails(tmp_path):
    (tmp_path / "job.py").write_text(
        "import sys, time; rank = int(sys.argv[1]); time.sleep(rank / 2); sys.exit(not rank and 3)"
    )

    def command(rank: int) -> list[str]:
        return [sys.executable, str(tmp_path / "job.py"), str(rank)]

    with nothing_left(tmp_path), pytest.raises(RankError) as caught:
        run_ranks(command, 2, tmp_path / "logs")
    assert "rank 0 ended with status 3, when rank 1 had ended with status 0;" in str(caught.value)
    assert caught.value.status == 3


@pytest.mark.long
def test_a_rank_that_does_not_come_is_named(tmp_path):
    with nothing_left(tmp_path), pytest.raises(RankError, match="rank 1 did not come to"):
        run_ranks(job("absent", tmp_path), 2, tmp_path / "logs", Limits(start_timeout=8))


@pytest.mark.long
def test_a_rank_that_is_silent_is_named(tmp_path):
    with (
        nothing_left(tmp_path),
        pytest.raises(RankError, match=r"rank 0 has waited \d+ s for rank 1"),
    ):
        run_ranks(job("silent", tmp_path), 2, tmp_path / "logs", Limits(90, silence=1))


@pytest.mark.long
def test_a_stranger_at_the_port_does_not_hang_the_start(tmp_path):
    """One connection to a rank's port takes its neighbour's place: the ring cannot be formed."""
    port = _free_port()
    ended = threading.Event()

    def knock():
        while not ended.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as stranger:
                stranger.settimeout(30)
                ended.wait(30)
            time.sleep(0.01)

    stranger = threading.Thread(target=knock, daemon=True)
    stranger.start()
    try:
        with nothing_left(tmp_path), pytest.raises(RankError) as caught:
            run_ranks(job("silent", tmp_path), 2, tmp_path / "logs", Limits(10, 5, port))
        assert "rank" in str(caught.value)
    finally:
        ended.set()
        stranger.join()


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        port = place.getsockname()[1]
        with pytest.raises(RankError, match=f"port {port} cannot be used .*in use"):
            run_ranks(job("equal", tmp_path), 2, tmp_path / "logs", Limits(port=port))
    with pytest.raises(RankError, match="port 70000 cannot be used"):
        run_ranks(job("equal", tmp_path), 2, tmp_path / "logs", Limits(port=70_000))
    assert not (tmp_path / "logs").exists()


def test_drawn_ports_are_none_that_outgoing_connections_get():
    drawn = [find_ports(2, None) for _ in range(20)]
    assert all(20_000 <= port < 32_768 for pair in drawn for port in pair)
    assert len({port for pair in drawn for port in pair}) > 30, "two launches at once draw others"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_its_supervisor(number, tmp_path):
    with nothing_left(tmp_path):
        supervisor = start_supervisor("forever", tmp_path)
        wait_for(tmp_path / "going-0", tmp_path / "going-1")
        supervisor.send_signal(number)
        try:
            said = supervisor.communicate(timeout=120)[1]
        finally:
            supervisor.kill()
    if number == signal.SIGINT:  # rank 0 finished its step and wrote a checkpoint, then all left
        assert "KeyboardInterrupt" in said
        assert "RankError" not in "".join(path.read_text() for path in tmp_path.glob("logs/*"))
        steps = len(read_rows(tmp_path / "run", "metrics.jsonl"))
        assert (tmp_path / f"run/checkpoints/step-{steps:06d}").is_dir()
        assert (tmp_path / "forever-1.pickle").exists()


SIGNS = """
import os, sys, time
from pathlib import Path
from workbench.runs import beats
import psutil
file = beats.follow_launcher(0)
file.write(beats.WAITING)
if hasattr(psutil._psplatform, "boot_time"):  # what psutil adds to the ticks of a process
    started = psutil._psplatform.boot_time()
    psutil._psplatform.boot_time = lambda: started + 3600
time.sleep(4 * beats.POLL_SECONDS)
file.write(beats.WORKING)
"""


def test_a_clock_that_is_set_ends_no_rank(tmp_path, monkeypatch):
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 3600)  # the supervisor's, not the rank's
    run_ranks(lambda rank: [sys.executable, "-c", SIGNS], 1, tmp_path, Limits(1800, 1800))


def options_of(*words: object):
    parser = ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


NOTEBOOK = """
import sys; sys.path.insert(0, {root!r})
import workbench as wb
from workbench.tuning.ranks import join_ranks
ranks = join_ranks()
ranks.gather("here", steps)
print("steps", steps)
assert steps < 9, "too many"
"""


def write_notebook(path) -> None:
    parameters = nbformat.v4.new_code_cell(
        "steps = 1\nverbose = False", metadata={"tags": ["parameters"]}
    )
    cells = [parameters, nbformat.v4.new_code_cell(NOTEBOOK.format(root=str(ROOT)))]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.mark.long
def test_a_notebook_runs_on_every_rank(tmp_path, capsys):
    write_notebook(tmp_path / "small.ipynb")
    out = tmp_path / "out"
    with nothing_left(tmp_path):
        assert launch.run(options_of(tmp_path / "small.ipynb", "-p", "steps", 3, "--out", out)) == 0
    executed = nbformat.read(out / "small.ipynb", as_version=4)
    assert "steps 3" in executed.cells[-1].outputs[0].text
    assert sorted(path.name for path in out.iterdir()) == [
        "rank-0.log", "rank-1.log", "small.ipynb",
    ]  # fmt: skip
    assert "without authentication" in capsys.readouterr().out


@pytest.mark.long
def test_a_failing_notebook_gives_its_status_and_its_copies(tmp_path, capsys):
    write_notebook(tmp_path / "small.ipynb")
    out = tmp_path / "out"
    with nothing_left(tmp_path):
        assert launch.run(options_of(tmp_path / "small.ipynb", "-p", "steps", 9, "--out", out)) == 1
    assert "too many" in capsys.readouterr().err
    assert list(out.rglob("small.failed.ipynb"))


@pytest.mark.long
def test_a_yaml_of_mlx_lm_trains_and_rank_0_saves(tmp_path, capsys):
    save_toy_folder(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"text": "abcdefgh"[: 3 + n] * 3} for n in range(5)]
    for split in ("train", "valid"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    settings = {
        "model": str(tmp_path / "model"), "data": str(tmp_path / "data"), "train": True, "iters": 3,
        "batch_size": 2, "num_layers": 2, "adapter_path": str(tmp_path / "adapter"),
    }  # fmt: skip
    (tmp_path / "lora.yaml").write_text(json.dumps(settings))
    code = launch.run(options_of(tmp_path / "lora.yaml", "--out", tmp_path / "out"))
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "adapter" / "adapters.safetensors").is_file()
    assert len(read_rows(tmp_path / "out" / "run", "metrics.jsonl")) == 3
    assert "step 3/3" in (tmp_path / "out" / "rank-0.log").read_text()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["job.txt"], "cannot run .txt"),
        (["job.py"], "no such file"),
        (["here.py", "-p", "steps", 1], "-p is for"),
        (["here.yaml", "--", "more"], "arguments are for a script"),
        (["here.py", "-n", 0], "num_ranks must be"),
        (["here.py", "--start-timeout", "nan"], "start_timeout must be"),
        (["here.py", "--port", 70_000], "port 70000 cannot be used"),
        (["here.py", "--port", 0], "port must be"),
        (["here.py", "-n", 100_000], "cannot be used"),
        (["here.ipynb", "-p", "steppes", 1], "'steppes' is not a parameter.*It has steps"),
        (["here.ipynb", "-p", "verbose", "false"], "'false' would be a text, which is true"),
    ],
)
def test_a_wrong_command_is_refused(words, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("here.py", "here.yaml"):
        (tmp_path / name).touch()
    write_notebook(tmp_path / "here.ipynb")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ConfigError, RankError), match=problem):
        launch.run(options_of(*words))
    assert sorted(tmp_path.iterdir()) == before, "nothing is left of it"
    assert capsys.readouterr().out == ""
