"""A job: what it leaves, and that none of its processes outlives another."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from tests.faults.processes import forked
from tests.small_notebooks import processes_of, write_notebook
from workbench.errors import RunError
from workbench.runs import jobs, lock
from workbench.runs.execution import WHOLE_OUTPUT
from workbench.runs.jobs import Job, run_job
from workbench.runs.notebooks import run_notebook
from workbench.runs.store import JOB_FOLDER

SLEEP = "import pathlib, time\npathlib.Path(run_dir, 'begun').touch()\ntime.sleep(300)"
SECONDS = 120  # limit for what takes some


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} takes too long"
        time.sleep(0.1)


def sleeping_job(tmp_path: Path) -> Job:
    """Sleeps in its second cell, and leaves a file when it has come there."""
    notebook = write_notebook(tmp_path / "sleep.ipynb", "run_dir = ''", SLEEP)
    return Job(notebook, {"run_dir": str(tmp_path / "run")}, tmp_path / "run")


def begun(job: Job) -> bool:
    return (job.folder / "begun").exists()


def test_a_job_runs_in_the_notebooks_folder_with_its_parameters_and_threads(tmp_path):
    shown = "import os\nprint('1')\nprint(text, number, os.environ['OPENBLAS_NUM_THREADS'])"
    cells = [shown, "os.getcwd()", "held = bytearray(200_000_000)\nimport time; time.sleep(1)"]
    notebook = write_notebook(tmp_path / "{odd}.ipynb", "text, number = '', 0", *cells)
    text = 'quote " and \\ and \n end'
    job = Job(notebook, {"text": text, "number": 3}, tmp_path / "run", threads=2)
    result = run_job(job)
    assert (result.state, result.error, result.cell) == ("finished", "", None)
    assert 1 < result.cells_seconds < result.seconds
    assert 200_000_000 < result.peak_bytes < 2_000_000_000
    executed = nbformat.read(job.folder / "notebook.ipynb", as_version=4)
    outputs = [cell.outputs for cell in executed.cells]
    assert outputs[2][0].text == f"1\n{text} 3 2\n"  # one piece, though printed in two
    assert outputs[3][0].data["text/plain"] == repr(str(tmp_path.resolve()))
    assert "papermill" not in json.dumps(executed.cells) + json.dumps(executed.metadata)
    assert text in (job.folder / "log.txt").read_text()
    left = {path.relative_to(job.folder).as_posix() for path in job.folder.rglob("*")}
    assert left == {"notebook.ipynb", "log.txt", JOB_FOLDER, f"{JOB_FOLDER}/{lock.LOCK_NAME}"}


FLOOD = "for number in range({lines}):\n    print(number, flush=True)"


def test_nothing_that_a_kernel_sends_is_lost_while_nobody_reads():
    lines = 15_000  # of which ZeroMQ would keep some thousand

    async def printed() -> str:
        manager = WHOLE_OUTPUT["kernel_manager_class"](kernel_name="python3")
        await manager.start_kernel()
        client, text = manager.client(), ""
        try:
            client.start_channels()
            await client.wait_for_ready(SECONDS)
            own = client.execute(FLOOD.format(lines=lines))
            while (await client.get_shell_msg(timeout=SECONDS))["parent_header"]["msg_id"] != own:
                pass
            while True:
                message = await client.get_iopub_msg(timeout=SECONDS)
                if message["parent_header"].get("msg_id") == own:
                    text += message["content"].get("text", "")
                    if message["content"].get("execution_state") == "idle":
                        return text
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)

    assert asyncio.run(printed()).split() == [str(number) for number in range(lines)]


@pytest.mark.long
@pytest.mark.parametrize("run", ["job", "notebook"])
def test_a_cell_may_print_faster_than_it_is_read(run, tmp_path):
    lines = 12_000
    notebook = write_notebook(tmp_path / "fast.ipynb", "n = 1", FLOOD.format(lines=lines))
    if run == "job":
        assert run_job(Job(notebook, {}, tmp_path / "run")).error == ""
        executed = tmp_path / "run/notebook.ipynb"
    else:
        executed = run_notebook(notebook, tmp_path / "out.ipynb", quiet=True)
    (printed,) = nbformat.read(executed, as_version=4).cells[-1].outputs
    assert printed.text.split() == [str(number) for number in range(lines)]


def test_a_kernel_is_reached_without_ports_and_leaves_no_socket(tmp_path):
    """Of two kernels that start at once, one may find a free port taken that it was promised."""
    cell = "from ipykernel.connect import get_connection_info as info\nprint(info())"
    notebook = write_notebook(tmp_path / "reached.ipynb", "n = 1", cell)
    assert run_job(Job(notebook, {}, tmp_path / "run")).error == ""
    (printed,) = nbformat.read(tmp_path / "run/notebook.ipynb", as_version=4).cells[-1].outputs
    reached = json.loads(printed.text)
    assert reached["transport"] == "ipc"
    assert not Path(reached["ip"]).parent.exists()


def test_a_failing_cell_and_a_dying_kernel_are_told_apart(tmp_path):
    cells = "import os\nos._exit(3) if dies else 1 / 0"
    notebook = write_notebook(tmp_path / "bad.ipynb", "dies = False", cells)
    jobs = [Job(notebook, {"dies": dies}, tmp_path / str(dies)) for dies in (False, True)]
    with ThreadPoolExecutor() as pool:
        failed, killed = pool.map(run_job, jobs)
    assert (failed.state, failed.cell) == ("failed", 3)
    assert failed.error == "ZeroDivisionError: division by zero"
    assert "1 / 0" in failed.traceback
    assert "\x1b" not in failed.traceback
    assert killed.state == "killed"
    assert "kernel died" in killed.error
    for job in jobs:
        assert (job.folder / "failed.ipynb").exists()
        assert not (job.folder / "notebook.ipynb").exists()


def test_a_cancelled_job_leaves_no_process(tmp_path):
    job = sleeping_job(tmp_path)
    seen = []

    def cancelled() -> bool:
        if begun(job):
            seen.extend(processes_of(job.folder))
        return bool(seen)

    assert run_job(job, cancelled).state == "cancelled"
    assert len(seen) == 2, "the executing process and its kernel"
    assert processes_of(job.folder) == []
    assert list((job.folder / JOB_FOLDER).iterdir()) == [job.folder / JOB_FOLDER / lock.LOCK_NAME]


def test_the_kernel_dies_with_the_process_that_executes(tmp_path):
    job = sleeping_job(tmp_path)

    def kill() -> None:
        wait_for(lambda: begun(job), "the start")
        (kernel,) = [p for p in processes_of(job.folder) if "ipykernel" in " ".join(p.cmdline())]
        kernel.parent().send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = run_job(job)
    killer.join()
    assert result.state == "killed"
    assert "signal 9" in result.error
    assert processes_of(job.folder) == []


@pytest.mark.long
def test_all_die_with_their_watcher_and_the_next_attempt_waits_for_that(tmp_path):
    job = sleeping_job(tmp_path)
    watch = functools.partial(watched, job)
    watcher = threading.Thread(target=forked, args=(watch, tmp_path / "watcher"))
    watcher.start()
    wait_for(lambda: begun(job), "the start")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    watcher.join()
    with lock.held(job.folder / JOB_FOLDER, SECONDS):
        assert processes_of(job.folder) == []


def watched(job: Job) -> None:
    """Watch a job in a process of its own, which writes down who it is."""
    (job.folder.parent / "pid").write_text(str(os.getpid()))
    run_job(job)


def test_two_never_run_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "WAIT_SECONDS", 0.2)
    job = sleeping_job(tmp_path)
    (job.folder / JOB_FOLDER).mkdir(parents=True)
    with (
        lock.held(job.folder / JOB_FOLDER, 0),
        pytest.raises(RunError, match="is being written by another process"),
    ):
        run_job(job)
