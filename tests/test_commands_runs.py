"""The list of runs in a terminal."""

from __future__ import annotations

import argparse
import builtins
import json
import math
import re

import pytest

from tests.toy_runs import toy_run, write_job
from workbench.commands.runs import add_arguments, run
from workbench.errors import ConfigError, RunError
from workbench.runs.results import record_results
from workbench.runs.store import RunFolder


@pytest.fixture
def runs(tmp_path, capsys):
    """Runs the command on three runs; its status and what it printed."""
    for name, steps in (("a", 3), ("b", 1), ("c", 2)):
        folder = write_job(
            toy_run(tmp_path / name, steps), parameters={"rank": steps, "run_dir": name}
        )
        record_results(folder, accuracy=steps / 4)

    def call(*words, root=tmp_path):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        status = run(parser.parse_args(["--root", str(root), *map(str, words)]))
        return status, capsys.readouterr().out

    return call


def test_the_table(runs):
    status, text = runs("--sort", "accuracy")
    head, *rows = [line.split() for line in text.splitlines()]
    assert status == 0
    assert head[:3] == ["name", "state", "steps"]
    assert head[-2:] == ["parameters.rank", "result.accuracy"]
    assert [row[0] for row in rows] == ["b", "c", "a"]
    assert rows[0][1:4] == ["finished", "1", "1"]
    assert rows[0][-2:] == ["1", "0.25"]
    words = ("--sort", "steps", "--largest", "--limit", 2, "--columns", "name,rank")
    assert runs(*words)[1].split() == ["name", "parameters.rank", "a", "3", "c", "2"]


def test_json(runs):
    rows = json.loads(runs("--json")[1])
    assert [row["steps"] for row in rows] == [3, 1, 2]
    assert rows[0]["best_valid_loss"] is None
    assert rows[0]["train.schedule"] == "cosine"
    assert json.loads(runs("--json", "--columns", "name", "--limit", 1)[1]) == [{"name": "a"}]
    assert "train.schedule" in runs("--columns", "all")[1]


def test_json_keeps_every_digit_and_is_json(runs, tmp_path):
    numbers = {"small": 1.2345e-21, "third": 1 / 3, "nan": math.nan}
    record_results(tmp_path / "a", **numbers, infinite=-math.inf, right=True, note="é\u202e")
    (tmp_path / "b" / "metrics.jsonl").unlink()
    text = runs("--json")[1]
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    first, second, third = json.loads(text)
    found = {name: first[f"result.{name}"] for name in numbers}
    assert found == numbers | {"nan": None}
    assert first["result.infinite"] is None
    assert (first["result.right"], first["result.note"]) == (True, "é\\u202e")
    assert (first["train.adam_epsilon"], first["started"][-5:]) == (1e-8, ".000Z")
    assert (second["loss"], second["peak_bytes"], second["result.small"]) == (None, None, None)
    assert third["total_steps"] == 2


def test_columns_of_any_kind_are_sorted(runs, tmp_path):
    record_results(tmp_path / "b", accuracy="none")
    for column in ("accuracy", "name", "started", "best_step", "problem"):
        assert len(runs("--sort", column)[1].splitlines()) == 4


def test_nothing_to_list(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert runs(root=tmp_path / "empty")[1] == f"No runs in {tmp_path / 'empty'}.\n"
    with pytest.raises(RunError, match="cannot be listed"):
        runs(root=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--limit"):
        runs("--limit", 0)
    with pytest.raises(ConfigError, match="no column"):
        runs("--columns", "nonsense")


@pytest.mark.parametrize(("answer", "left"), [("y", 2), ("YES ", 2), ("n", 3), ("", 3), (None, 3)])
def test_deleting_asks_first(runs, tmp_path, monkeypatch, answer, left):
    def reply(question):
        assert str(tmp_path / "b") in question
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(builtins, "input", reply)
    status, text = runs("--delete", tmp_path / "b")
    assert status == (left == 3)
    assert ("Deleted" in text, "Nothing was deleted" in text) == (left == 2, left == 3)
    assert len(json.loads(runs("--json")[1])) == left


def test_a_run_is_deleted_by_its_name_in_the_table(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_run(tmp_path / "deep" / "d")
    assert runs("--delete", "deep/d", "--yes", root="../" + tmp_path.name)[0] == 0
    monkeypatch.chdir(tmp_path.parent)
    assert runs("--delete", "b", "--yes")[0] == 0
    assert [row["name"] for row in json.loads(runs("--json")[1])] == ["a", "c"]
    (tmp_path / "a").rename(tmp_path / "deep" / "c")
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises(ConfigError, match=r"'c' is two runs: .*Give the whole path"):
        runs("--delete", "c", "--yes")
    with pytest.raises(RunError, match="is no folder"):
        runs("--delete", "zz", "--yes")
    assert runs("--delete", tmp_path / "c", "--yes")[0] == 0
    assert [row["name"] for row in json.loads(runs("--json")[1])] == ["deep/c"]


def test_deleting_without_a_question(runs, tmp_path):
    holder = RunFolder(tmp_path / "b", {})
    with pytest.raises(RunError, match="is being written"):
        runs("--delete", tmp_path / "b", "--yes")
    del holder
    assert runs("--delete", tmp_path / "b", "--yes")[0] == 0
    assert not (tmp_path / "b").exists()
