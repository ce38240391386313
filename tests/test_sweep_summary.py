"""The notebook that compares a sweep's runs is there, whatever the runs have written."""

from __future__ import annotations

import json
import math

import nbformat
import pytest

import workbench as wb
from tests.small_notebooks import write_notebook
from tests.test_sweep import FINISHED, Quick
from tests.toy_runs import rows
from workbench.live.sweep import sweep_html
from workbench.runs.sweep import Sweep
from workbench.runs.sweep_result import SweepResult
from workbench.runs.sweep_summary import _cells

GRID = {"a": [1, 2], "b": [1, 2]}
NESTED = {"a": [{"lr": 0.1, "n": 1}, {"lr": 0.2, "n": 1}], "b": [1, 2]}
METRICS = "".join(json.dumps(row) + "\n" for row in rows(3))
LOSS = '{"step": 1, "total_steps": 3, "loss": 1.0}\n'


def quick(metrics: str = METRICS, results=lambda _: {}) -> Quick:
    """Runs that leave such files; results are a function of the parameters."""

    def answer(job):
        (job.folder / "config.json").write_text("{}")
        (job.folder / "metrics.jsonl").write_text(metrics)
        (job.folder / "results.json").write_text(json.dumps(results(job.parameters)))
        return FINISHED

    return Quick(answer)


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "x.ipynb", "a = 1\nb = 1")


@pytest.mark.parametrize(
    ("grid", "files", "drawn", "reason"),
    [
        (GRID, {}, 2, None),
        (NESTED, {}, 2, None),
        ({"a": [[1], [2]], "b": [None, 1, 2]}, {}, 2, None),
        (GRID, {"results": lambda p: {"x": p["a"] / 2, "note": "a"}}, 2, None),
        (GRID, {"results": lambda p: {"x": math.nan}}, 1, r"no run has a result\.x"),
        (GRID, {"results": lambda p: {"x": 1 if p["a"] == 1 else "-"}}, 1, "is no number"),
        (GRID, {"results": lambda p: {"$x$\n\x1b[1m": p["b"]}}, 2, None),
        (GRID, {"metrics": "", "results": lambda p: {"x": p["b"]}}, 1, None),
        (GRID, {"metrics": METRICS + "{\n"}, 1, "no run of the table has a loss"),
        (GRID, {"metrics": "x\n" + LOSS}, 0, "no run of the table has a loss"),
        (GRID, {"metrics": LOSS}, 1, "no run of the table has a loss"),
        (GRID, {"metrics": LOSS.replace("1.0", "1" + "0" * 400)}, 0, None),
        (GRID, {"metrics": '{"a":' * 10_000 + "\n"}, 0, None),
    ],
)
def test_what_cannot_be_drawn_is_left_out_and_said(
    notebook, tmp_path, monkeypatch, capsys, grid, files, drawn, reason
):
    sweep = Sweep(notebook, grid, tmp_path / "out", executor=quick(**files))
    assert all(run is None or sweep_html(sweep, 1.0) for run in sweep)
    monkeypatch.chdir(sweep.root)
    pictures, names = 0, {}
    for is_code, text in _cells(SweepResult(sweep.root, sweep.runs)):
        if is_code and text.startswith("figure("):
            pictures += eval(text, names) is not None
        elif is_code:
            exec(text, names)
    assert pictures == drawn
    said = [line for line in capsys.readouterr().out.splitlines() if "Not drawn" in line]
    assert bool(said) == bool(reason)
    assert not reason or reason.replace("\\", "") in said[0]


def test_the_sweep_ends_with_its_runs_though_nothing_of_them_can_be_drawn(notebook, tmp_path):
    left = quick(LOSS + "\0", lambda p: {"x": math.nan, "y\x1b[1m": "\ud800", "z": "\x07"})
    swept = wb.sweep(notebook, NESTED, tmp_path / "out", executor=left)
    assert [run.state for run in swept.runs] == ["finished"] * 4
    cells = nbformat.read(swept.summary, as_version=4).cells
    printed = [out.text for cell in cells for out in cell.get("outputs", []) if "text" in out]
    assert sum("Not drawn: no run" in text for text in printed) == 2
    assert swept.table["y\\x1b[1m"].tolist() == ["?"] * 4
