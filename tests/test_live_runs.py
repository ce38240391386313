"""A run is drawn again from its folder, whatever became of it."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.process import finish, start
from tests.toy_training import toy_trainer
from workbench.errors import RunError
from workbench.live.chart import draw
from workbench.live.runs import read_reports, show_run

PNG = b"\x89PNG"


def test_reports_come_back_as_they_were(tmp_path):
    trainer = toy_trainer(valid=[9, 12], run_dir=tmp_path / "run", valid_every=2, epochs=3)
    list(trainer)
    assert read_reports(tmp_path / "run") == trainer.reports
    assert show_run(tmp_path / "run").data == draw(trainer.reports)


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
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match=says):
        show_run(tmp_path)
