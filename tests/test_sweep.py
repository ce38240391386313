"""Sweeps: order, memory, retries, what is skipped and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.killing import at_boundary
from tests.small_notebooks import write_notebook
from workbench.errors import ConfigError, FileFormatError, RunError
from workbench.live.sweep import sweep_html
from workbench.machine import machine_memory
from workbench.runs.jobs import Job, JobResult
from workbench.runs.sweep import Sweep
from workbench.runs.sweep_result import read_sweep

FINISHED = JobResult("finished", 3.0, 2.0, 10)
BROKEN = JobResult("failed", 3.0, 2.0, 10, "ZeroDivisionError: division by zero", 3, "1 / 0")


class Quick:
    """An executor that starts no kernels: `answer` says how each job ends."""

    shares_memory = True

    def __init__(self, answer: Callable[[Job], JobResult] = lambda _: FINISHED, at_once: int = 1):
        self.at_once, self.answer, self.jobs = at_once, answer, []
        self.most = 0  # that ran together
        self.cancelled, self._running = threading.Event(), 0
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(at_once)

    def submit(self, job: Job) -> Future[JobResult]:
        self.jobs.append(job)
        return self._pool.submit(self._run, job)

    def _run(self, job: Job) -> JobResult:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(0.05)
        with self._lock:
            self._running -= 1
        return JobResult("cancelled") if self.cancelled.is_set() else self.answer(job)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self._pool.shutdown()

    @property
    def parameters(self) -> list[dict[str, object]]:
        """Of all jobs, in the order of their starts, without the folder."""
        return [{k: v for k, v in job.parameters.items() if k != "run_dir"} for job in self.jobs]


@pytest.fixture
def notebook(tmp_path) -> Path:
    return write_notebook(tmp_path / "train.ipynb", "a = 1\nb = 1\nrun_dir = ''", "a / b")


def states(sweep: Sweep) -> list[tuple[object, str]]:
    """Run to the end: a's value and the state, at each event."""
    return [(run.parameters["a"], run.state) for run in sweep if run is not None]


def test_each_run_gets_its_parameters_and_its_folder(notebook, tmp_path):
    root, quick = tmp_path / "out", Quick()
    sweep = Sweep(notebook, {"a": [1, 2], "b": [3]}, root, executor=quick)
    wanted = [(1, "running"), (1, "finished"), (2, "running"), (2, "finished")]
    assert states(sweep) == wanted
    for job, run in zip(quick.jobs, sweep.runs):
        assert job.parameters == {**run.parameters, "run_dir": str(run.folder)}
        assert job.folder.parent == root
        assert job.folder.name.startswith("a=")
        assert job.cwd == notebook.parent
        assert job.notebook.read_text() == notebook.read_text()


def test_a_notebook_without_run_dir_gets_none(tmp_path):
    notebook = write_notebook(tmp_path / "plain.ipynb", "a = 1", "a")
    quick = Quick()
    states(Sweep(notebook, {"a": [1]}, tmp_path / "out", executor=quick))
    assert quick.jobs[0].parameters == {"a": 1}


def test_what_finished_is_skipped_and_the_rest_starts_again(notebook, tmp_path):
    first = Quick(lambda job: BROKEN if job.parameters["a"] == 2 else FINISHED)
    grid = {"a": [1, 2, 3]}
    states(Sweep(notebook, grid, tmp_path / "out", executor=first, retries=0))
    crashed = json.loads((first.jobs[2].folder / "job.json").read_text())
    crashed["state"] = "running"  # as a killed sweep leaves it
    (first.jobs[2].folder / "job.json").write_text(json.dumps(crashed))
    again = Quick()
    states(Sweep(notebook, {"a": [1, 2, 3, 4]}, tmp_path / "out", executor=again))
    assert again.parameters == [{"a": 2}, {"a": 3}, {"a": 4}]
    assert [job.folder for job in again.jobs[:2]] == [job.folder for job in first.jobs[1:]]
    assert set(read_sweep(tmp_path / "out").table.state) == {"finished"}


def test_where_all_has_finished_no_cluster_is_needed(notebook, tmp_path):
    states(Sweep(notebook, {"a": [1]}, tmp_path / "out", executor=Quick()))
    again = Sweep(notebook, {"a": [1]}, tmp_path / "out", executor="tcp://127.0.0.1:9")
    assert states(again) == []
    assert [run.state for run in again.runs] == ["finished"]


def test_a_failing_run_is_tried_again_and_stops_no_other(notebook, tmp_path):
    quick = Quick(lambda job: BROKEN if job.parameters["a"] == 1 else FINISHED)
    sweep = Sweep(notebook, {"a": [1, 2]}, tmp_path / "out", executor=quick, retries=2)
    states(sweep)
    assert quick.parameters == [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 1}]
    (failure,) = sweep.failures
    assert (failure.parameters, failure.attempts) == ({"a": 1}, 3)
    table = read_sweep(tmp_path / "out").table
    assert table.error.tolist() == ["ZeroDivisionError: division by zero", ""]
    assert table.attempts.tolist() == [3, 1]


def test_unknown_memory_is_learned_from_the_first_run(notebook, tmp_path):
    room = machine_memory().available_bytes
    for share, most in ((0.01, 3), (0.6, 1)):
        taken = JobResult("finished", 1.0, 1.0, int(share * room))
        quick = Quick(lambda _, taken=taken: taken, at_once=3)
        sweep = Sweep(notebook, {"a": [1, 2, 3, 4]}, tmp_path / str(share), executor=quick)
        events = states(sweep)
        assert events[1] == (1, "finished"), "the first run goes alone"
        assert quick.most == most
        assert len(quick.jobs) == 4


def test_a_run_that_failed_early_does_not_make_memory_known(notebook, tmp_path):
    large = int(0.8 * machine_memory().available_bytes)

    def answer(job):
        early = JobResult("failed", 1.0, 1.0, 10, "ImportError: no such module", 2)
        return early if job.parameters["a"] == 1 else JobResult("finished", 1.0, 1.0, large)

    quick = Quick(answer, at_once=3)
    for _ in range(2):  # the second sweep reads what the first one's folders say
        states(Sweep(notebook, {"a": [1, 2, 3, 4]}, tmp_path / "out", executor=quick))
        states(Sweep(notebook, {"a": [1, 5]}, tmp_path / "failed", executor=quick))
    assert quick.most == 1

    failed = JobResult("failed", 1.0, 1.0, large, "MemoryError", 2)
    quick = Quick(lambda job: failed if job.parameters["a"] == 2 else FINISHED, at_once=3)
    grid = {"a": [1, 2, 3, 4]}
    states(Sweep(notebook, grid, tmp_path / "raised", executor=quick, retries=0))
    again = Quick(at_once=3)
    states(Sweep(notebook, {"a": [2, 7, 8]}, tmp_path / "raised", executor=again))
    assert again.most == 1, "what a failed run took raises the estimate"


def test_runs_that_do_not_fit_together_never_run_together(notebook, tmp_path):
    room = machine_memory().available_bytes
    needs = {1: 0.6, 2: 0.6, 3: 0.2, 4: 0.1}
    quick = Quick(at_once=4)
    sweep = Sweep(
        notebook,
        {"a": list(needs)},
        tmp_path / "out",
        executor=quick,
        memory=lambda parameters: int(needs[parameters["a"]] * room),
    )
    going, largest = set(), 0
    for run in filter(None, sweep):
        (going.add if run.state == "running" else going.discard)(run.parameters["a"])
        largest = max(largest, sum(needs[a] for a in going))
    assert largest == pytest.approx(0.9), "the small ones go beside a large one"
    assert len(quick.jobs) == 4


def test_a_run_that_cannot_fit_alone_is_refused_by_name(notebook, tmp_path):
    def need(parameters):
        return 10**16 if parameters["a"] == 2 else 10**6

    with pytest.raises(ConfigError, match=r"a=2 needs 10000000\.00 GB of memory"):
        Sweep(notebook, {"a": [1, 2]}, tmp_path / "out", memory=need)
    with pytest.raises(ConfigError, match="memory, in bytes, must be a whole number"):
        Sweep(notebook, {"a": [1]}, tmp_path / "out", memory=1.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["c", "a b", "import", "a = 2; b", "__import__('os')", ""])
def test_what_is_no_parameter_is_refused_before_anything_runs(notebook, tmp_path, name):
    with pytest.raises(ConfigError, match=r"is not a parameter.*It has a, b, run_dir"):
        Sweep(notebook, {name: [1]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_that_means_false_is_not_taken_for_true(tmp_path):
    cell = "flag: bool = True  # a switch\nname = 'on'"
    notebook = write_notebook(tmp_path / "flags.ipynb", cell)
    for text in ("false", "True", "no"):
        with pytest.raises(ConfigError, match=rf"flag is True there, and '{text}' would be a text"):
            Sweep(notebook, {"name": ["false"], "flag": [False, text]}, tmp_path / "out")
    Sweep(notebook, {"flag": [True, False, None, "auto", 0], "name": ["off"]}, tmp_path / "out")


def test_notebooks_that_cannot_be_swept_are_refused(notebook, tmp_path):
    untagged = write_notebook(tmp_path / "untagged.ipynb", "a = 1", "a", tag="other")
    with pytest.raises(ConfigError, match=r"has no parameters.*Tag the cell"):
        Sweep(untagged, {"a": [1]}, tmp_path / "out")
    with pytest.raises(ConfigError, match="'run_dir' is the run's folder"):
        Sweep(notebook, {"run_dir": ["x"]}, tmp_path / "out")
    with pytest.raises(RunError, match="no such notebook"):
        Sweep(tmp_path / "none.ipynb", {"a": [1]}, tmp_path / "out")
    (tmp_path / "broken.ipynb").write_text('{"cells": 3')
    with pytest.raises(RunError, match="is not a notebook"):
        Sweep(tmp_path / "broken.ipynb", {"a": [1]}, tmp_path / "out")


def test_runs_of_another_version_of_the_notebook_are_not_mixed_in_silence(notebook, tmp_path):
    root = tmp_path / "out"
    states(Sweep(notebook, {"a": [1]}, root, executor=Quick()))
    notebook.write_text(notebook.read_text().replace('"outputs": []', '"outputs": [ ]'))
    states(Sweep(notebook, {"a": [1]}, root, executor=Quick()))
    write_notebook(notebook, "a = 1\nb = 1\nrun_dir = ''", "a / b / 2")
    with pytest.raises(ConfigError, match=r"1 of 2 runs .*another version of train\.ipynb"):
        Sweep(notebook, {"a": [1, 2]}, root)
    quick = Quick()
    states(Sweep(notebook, {"a": [1, 2]}, root, executor=quick, allow_changes=True))
    assert quick.parameters == [{"a": 2}]


def test_leaving_the_loop_ends_what_runs_and_the_sweep_can_go_on(notebook, tmp_path):
    root, quick = tmp_path / "out", Quick(at_once=2)
    quick.answer = lambda _: JobResult("cancelled" if quick.cancelled.wait(60) else "finished")
    sweep = Sweep(notebook, {"a": [1, 2, 3]}, root, executor=quick, memory=1)
    with contextlib.closing(iter(sweep)) as events:
        next(events)
        next(events)
        with pytest.raises(RunError, match="is being written by another process"):
            list(Sweep(notebook, {"a": [9]}, root))
    assert quick.cancelled.is_set()
    assert [run.state for run in read_sweep(root).runs] == ["cancelled", "cancelled"]
    again = Quick()
    states(Sweep(notebook, {"a": [1, 2, 3]}, root, executor=again))
    assert len(again.jobs) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_stops_the_sweep_by_name_and_it_goes_on_later(notebook, tmp_path, code):
    def refuse(_: str) -> None:
        raise OSError(code, os.strerror(code))

    grid, errors = {"a": [1, 2]}, []
    for number in range(1, 100):
        root = tmp_path / str(number)
        with at_boundary(number, refuse, lasting=True):
            try:
                states(Sweep(notebook, grid, root, executor=Quick(at_once=2), memory=1))
            except RunError as error:
                errors.append(str(error))
        states(Sweep(notebook, grid, root, executor=Quick()))
        assert read_sweep(root).table.state.tolist() == ["finished"] * 2
        assert not list(root.rglob(".tmp-*"))
        if len(errors) < number:
            break
    assert len(errors) >= 8
    assert all(os.strerror(code) in text and "Free some space" in text for text in errors)


def test_a_folder_that_a_job_cannot_write_stops_the_sweep(notebook, tmp_path):
    def fail(job):
        raise RunError("cannot be written (No space left on device)", where=job.folder)

    with pytest.raises(RunError, match="No space left"):
        states(Sweep(notebook, {"a": [1, 2]}, tmp_path / "out", executor=Quick(fail)))
    again = Quick()
    states(Sweep(notebook, {"a": [1, 2]}, tmp_path / "out", executor=again))
    assert len(again.jobs) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "done"}, "has the state 'done'"),
        ({"attempts": True}, "has no proper 'attempts'"),
        ({"seconds": float("nan")}, "has no proper 'seconds'"),
        ({"parameters": [1]}, "has no proper 'parameters'"),
        ({"parameters": {"a": 7}}, "is of other parameters"),
        ({"traceback": None}, "has no proper 'traceback'"),
    ],
)
def test_a_damaged_record_is_named(notebook, tmp_path, change, message):
    quick = Quick()
    states(Sweep(notebook, {"a": [1]}, tmp_path / "out", executor=quick))
    path = quick.jobs[0].folder / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((FileFormatError, RunError), match=re.escape(message)):
        Sweep(notebook, {"a": [1]}, tmp_path / "out")


def test_the_table_holds_results_and_the_last_loss(notebook, tmp_path):
    quick = Quick()
    states(Sweep(notebook, {"a": [10, 9], "b": ["x"]}, tmp_path / "out", executor=quick))
    folder = quick.jobs[0].folder
    (folder / "results.json").write_text('{"accuracy": 0.5, "a": 3, "deep": {}}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    swept = read_sweep(tmp_path / "out")
    assert swept.table.a.tolist() == [9, 10], "by value"
    row = swept.table.iloc[1]
    assert (row["accuracy"], row["result.a"], row["loss"]) == (0.5, 3, 2.5)
    assert row["overhead_seconds"] == 1.0
    assert repr(swept).endswith("2 finished")
    with pytest.raises(RunError, match="holds no sweep"):
        read_sweep(tmp_path)


def test_the_live_table_shows_texts_as_they_are(notebook, tmp_path):
    hostile = "<script>alert(1)</script>"
    wrong = JobResult("failed", 1.0, 0.5, 10, "<b>&</b> $x$")
    sweep = Sweep(notebook, {"a": [hostile]}, tmp_path / "out", executor=Quick(lambda _: wrong))
    states(sweep)
    (folder,) = (run.folder for run in sweep.runs)
    (folder / "metrics.jsonl").write_text('{"step": 3, "total_steps": 4, "loss": 0.25}\n')
    page = sweep_html(sweep, 61.0)
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
    for text in ("failed", "3/4", "width:75%", "0.2500", "1 runs of train.ipynb: 1 failed · 1:01"):
        assert text in page


def test_no_column_of_the_table_hides_a_parameter_or_a_result(tmp_path):
    notebook = write_notebook(tmp_path / "x.ipynb", "seconds = 1\nloss = 'ce'\nstate = 'CA'")
    quick, given = Quick(), {"seconds": 60, "loss": "dpo", "state": "NY"}
    for _ in Sweep(notebook, [given], tmp_path / "out", executor=quick):
        pass
    (quick.jobs[0].folder / "results.json").write_text('{"error": 0.25, "seconds": 7}')
    row = read_sweep(tmp_path / "out").table.iloc[0]
    assert [row[f"parameters.{name}"] for name in given] == [60, "dpo", "NY"]
    assert (row["state"], row["seconds"], row["error"]) == ("finished", 3.0, "")
    assert (row["result.error"], row["result.seconds"]) == (0.25, 7)
