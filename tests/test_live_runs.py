"""A run is drawn again from its folder, whatever became of it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import pytest

from tests.process import finish, start
from tests.toy import write_jsonl
from tests.toy_panel import toy_report
from tests.toy_training import toy_trainer
from workbench.errors import RunError
from workbench.live.run_chart import draw
from workbench.live.runs import read_reports, show_run
from workbench.live.samples import Sample, as_rows
from workbench.probes.guard import MemoryGuard

PNG = b"\x89PNG"
ROW = dataclasses.asdict(toy_report(1))


def test_reports_come_back_as_they_were(tmp_path):
    trainer = toy_trainer(valid=[9, 12], run_dir=tmp_path / "run", valid_every=2, epochs=3)
    list(trainer)
    assert read_reports(tmp_path / "run") == trainer.reports
    shown = show_run(tmp_path / "run")
    assert shown.data == draw(trainer.reports, limit_of=MemoryGuard().limit)
    assert shown.reports == trainer.reports
    assert shown.status.state == "Finished"
    assert shown.samples == []


def test_the_limit_of_the_run_is_drawn(tmp_path):
    limit = 1_500_000_000
    trainer = toy_trainer(run_dir=tmp_path / "run", memory_limit_bytes=limit)
    list(trainer)
    shown = show_run(tmp_path / "run")
    assert shown.data == draw(trainer.reports, limit_of=lambda report: limit)
    (tmp_path / "run" / "config.json").write_text("{}")
    assert show_run(tmp_path / "run").data == draw(trainer.reports)


def test_samples_are_shown_with_the_run(tmp_path):
    trainer = toy_trainer(run_dir=tmp_path / "run")
    list(trainer)
    samples = [Sample(0, "a <b>?", "\x1b[31m$x$"), Sample(2, "a <b>?", "\ud800")]
    for row in as_rows(samples):
        trainer.run.append(row, "samples.jsonl")
    assert show_run(tmp_path / "run").samples == samples
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "prompt": "half')
    assert show_run(tmp_path / "run").samples == samples
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('"}\n')
    with pytest.raises(RunError, match=r"lacks one of .*answer"):
        show_run(tmp_path / "run")


def test_counters_that_were_missing_stay_missing(tmp_path):
    trainer = toy_trainer(run_dir=tmp_path / "run")
    list(trainer)
    rows = [dataclasses.asdict(report) for report in trainer.reports]
    for row in rows:
        row["process_bytes"] = row["available_bytes"] = None
    write_jsonl(tmp_path / "run" / "metrics.jsonl", rows)
    shown = show_run(tmp_path / "run")
    assert {report.process_bytes for report in shown.reports} == {None}
    assert shown.data.startswith(PNG)


def test_a_half_written_last_line_is_left_out(tmp_path):
    trainer = toy_trainer(run_dir=tmp_path / "run")
    list(trainer)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 99, "lo')
    assert read_reports(tmp_path / "run") == trainer.reports


def test_a_killed_run_is_drawn(tmp_path):
    process = start(
        "from tests.toy_training import toy_trainer\n"
        f"for report in toy_trainer(run_dir={str(tmp_path / 'run')!r}, steps=100000): pass"
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > 5000):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert show_run(tmp_path / "run").data.startswith(PNG)  # while it is going on
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert show_run(tmp_path / "run").status.state == "Not finished"
    reports = read_reports(tmp_path / "run")
    assert [report.step for report in reports] == list(range(1, len(reports) + 1))
    assert show_run(tmp_path / "run").data.startswith(PNG)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no readable metrics"),
        ("", "not finished a step"),
        ('{"step": 1', "not finished a step"),
        (json.dumps({"step": 1, "loss": 2.0}) + "\n", "lacks .*learning_rate"),
        ("[1, 2]\n{}\n", "damaged .not a JSON object"),
        ("not json\n", "damaged"),
        (json.dumps({**ROW, "loss": "low"}) + "\n", "jsonl:1: loss is 'low', which is no number"),
        (json.dumps({**ROW, "grad_norm": None}) + "\n", "grad_norm is None"),
        (json.dumps({**ROW, "loss": float("nan")}) + "\n", "loss is nan"),
        (json.dumps({**ROW, "process_bytes": [1]}) + "\n", "process_bytes is .1."),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match=says):
        show_run(tmp_path)
