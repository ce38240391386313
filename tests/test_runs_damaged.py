"""Damaged and hostile run folders: each is a row that says so, and spoils no other."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.process import run
from tests.toy import write_jsonl
from tests.toy_runs import row_of, rows, toy_run
from workbench.runs import table as runs_table
from workbench.runs.table import runs


@pytest.mark.fault("hostile runs")
@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[1]", "config.json holds no JSON object"),
        ("config.json", '{"a":' * 100_000, "nested deeper"),
        ("config.json", '{"a": ' + "1" * 5000 + "}", "config.json is damaged"),
        ("config.json", " " * 1_100_000, "config.json is larger"),
        ("config.json", None, "config.json is no regular file"),
        ("metrics.jsonl", None, "metrics.jsonl is no regular file"),
        ("metrics.jsonl", "x\n", "metrics.jsonl: line 1 is no JSON"),
        ("metrics.jsonl", '{"step": 1}\n\x00\x00\n', "line 2 is no JSON"),
        ("metrics.jsonl", '{"step": 1}\n[2]\n', "line 2 is no JSON object"),
        ("metrics.jsonl", '{"loss": "low"}\n', "the loss 'low', which is no number"),
        ("metrics.jsonl", '{"loss": true}\n', "the loss 'True', which is no number"),
        ("metrics.jsonl", '{"step": -1}\n', "no whole number"),
        ("metrics.jsonl", '{"step": 1e30}\n', "no whole number"),
        ("metrics.jsonl", '{"peak_bytes": ' + "9" * 400 + "}\n", "peak_bytes that is too large"),
        ("metrics.jsonl", '{"a":' * 100_000 + "\n", "nested too deep"),
        ("metrics.jsonl", "1" * 3_000_000, "longer than"),
        ("results.json", "{}}", "results.json is damaged"),
        ("job.json", "\udcff", "job.json is damaged"),
    ],
)
def test_a_damaged_run_is_a_row_and_says_why(tmp_path, name, content, problem):
    toy_run(tmp_path / "whole"), toy_run(tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)  # which would wait for a writer
    else:
        path.write_text(content, errors="surrogateescape")
    for _ in range(2):  # read, and known from the index
        table = runs(tmp_path).set_index("name")
        assert table.state.to_dict() == {"whole": "finished", "run": "damaged"}
        assert problem in table.problem["run"]
    path.unlink()
    if name == "config.json":
        path.write_text("{}")
    assert row_of(tmp_path).problem == ""


def test_a_damaged_last_line_leaves_the_numbers_before_it(tmp_path):
    folder = toy_run(tmp_path / "run", 4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    row = row_of(tmp_path)
    assert (row.state, row.steps, row.problem[:22]) == ("damaged", 4, "metrics.jsonl: line 5 ")


@pytest.mark.fault("hostile runs")
def test_hostile_values_become_plain_ones(tmp_path):
    folder = toy_run(tmp_path / "run", 2)
    config = {
        "steps": 7, "result.x": 1, "parameters.y": 2, "nan": math.nan, "huge": 10**400,
        "big": 2**63,
        "a\x1b[31m\nb": "\x1b]0;owned\x07\u202e", "long": "x" * 5000, "list": [[1], {"a": None}],
        "none": None, "empty": {}, "surrogate": "\ud800", **{f"many {n}": n for n in range(500)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    lost = dict.fromkeys(("loss", "valid_loss", "tokens_per_second", "step_seconds"), -math.inf)
    write_jsonl(folder / "metrics.jsonl", rows(3, **lost))
    for _ in range(2):
        row = row_of(tmp_path)
        assert (row.state, row.steps) == ("finished", 3)
        assert np.isnan([row.loss, row.best_valid_loss]).all()
        assert row["config.steps"] == 7
        assert (row["config.result.x"], row["config.parameters.y"]) == (1, 2)
        assert (row.huge, row.big, row.list) == (math.inf, 2.0**63, '[[1], {"a": null}]')
        assert len(row.long) == 301
        shown = "".join(map(str, [*row.index, *row]))
        assert shown.isprintable()
        assert len(row) < 250


def test_a_name_that_cannot_be_shown_is_a_damaged_row(tmp_path):
    toy_run(tmp_path / "a\x1b[31m\nb"), toy_run(tmp_path / "b")
    table = runs(tmp_path)
    assert table.name.tolist() == ["a\\x1b[31m\\nb", "b"]
    assert table.state.tolist() == ["damaged", "finished"]
    assert runs(tmp_path).equals(table)


def test_many_names_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_table, "MAX_COLUMNS", 6)
    for number in range(5):
        folder = toy_run(tmp_path / f"run-{number}", 1)
        config = {"shared": number, **{f"own {number} {n}": n for n in range(5)}}
        (folder / "config.json").write_text(json.dumps(config))
    table = runs(tmp_path)
    assert table.shared.tolist() == [0, 1, 2, 3, 4]
    assert sum(name.startswith("own") for name in table) == 5


READ_ONLY = """
    import os, warnings
    warnings.simplefilter("error")
    from workbench.runs import records
    from workbench.runs.table import runs
    if os.getuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    table = runs({root!r})
    assert table.steps.tolist() == [1, 2, 3, 4], table
    assert table.problem.tolist() == [""] * 4, table.problem.tolist()
    read = []
    own = records.read_on
    records.read_on = lambda path, digest: read.append(path) or own(path, digest)
    runs({root!r})
    print(len(read))
"""


@pytest.mark.fault("index of the runs")
def test_on_a_disk_to_read_from_the_old_index_still_helps():
    with tempfile.TemporaryDirectory() as place:  # pytest keeps others out of its own folders
        os.chmod(place, 0o755)
        root = Path(place) / "runs"
        folders = [toy_run(root / name, number) for number, name in enumerate("abc", 1)]
        runs(root)
        folders += [toy_run(root / "d", 4), root]
        for folder in folders:
            os.chmod(folder, 0o555)
        finished = run(READ_ONLY.format(root=str(root)))
        for folder in folders:
            os.chmod(folder, 0o755)
    assert (finished.code, finished.out) == (0, "1"), finished.err  # of four
