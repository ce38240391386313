"""A table of every run: what it says, and that it is right whatever becomes of the folders."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import threading

import numpy as np
import pandas as pd
import pytest

from tests.toy import write_jsonl
from tests.toy_runs import row_of, rows, toy_run, write_job
from tests.toy_training import toy_trainer
from workbench.errors import ConfigError, RunError
from workbench.runs import index, records
from workbench.runs.index import INDEX_NAME
from workbench.runs.results import record_results
from workbench.runs.store import RunFolder
from workbench.runs.table import best_run, compare_configs, runs

ADAPTER_COLUMNS = ["adapter.kind", "adapter.rank", "adapter.scale"]


def test_a_training_is_a_row_with_its_numbers(tmp_path):
    trainer = toy_trainer(valid=[9, 12], run_dir=tmp_path / "run", valid_every=2, epochs=3)
    reports = list(trainer)
    record_results(tmp_path / "run", accuracy=np.float32(0.5), note="a", mean=math.nan)
    row = row_of(tmp_path)
    assert (row.state, row.steps, row.total_steps) == ("finished", len(reports), len(reports))
    assert row.loss == reports[-1].loss
    best = min((r for r in reports if r.valid_loss is not None), key=lambda r: r.valid_loss)
    assert (row.best_valid_loss, row.best_step) == (best.valid_loss, best.step)
    middle = np.median([report.tokens_per_second for report in reports])
    assert row.tokens_per_second == pytest.approx(middle, rel=1e-4)
    seconds = sum(report.step_seconds + (report.valid_seconds or 0) for report in reports)
    assert row.seconds == pytest.approx(seconds)
    assert row.peak_bytes == max(report.peak_bytes for report in reports)
    assert row.process_bytes == max(report.process_bytes for report in reports)
    assert (row["result.accuracy"], row["result.note"]) == (0.5, "a")
    assert math.isnan(row["result.mean"])
    assert row["train.learning_rate"] == trainer.config.learning_rate
    assert row["train.adam_betas"] == json.dumps(trainer.config.adam_betas)
    assert {"environment.mlx", "environment.BLAS", "environment.device"} <= set(row.index)
    assert {"environment.machine", "environment.python", "environment.workbench"} <= set(row.index)
    assert os.path.samefile(row.folder, tmp_path / "run")
    written = pd.Timestamp((tmp_path / "run" / "config.json").stat().st_mtime, unit="s", tz="UTC")
    assert abs((row.started - written).total_seconds()) <= 1


def test_networks_and_adapters_that_differ_are_columns(tmp_path):
    toy_trainer(run_dir=tmp_path / "a")
    other = {"rank": 2, "alpha": 8, "use_dora": True}
    toy_trainer(run_dir=tmp_path / "b", network={"rope_theta": 5e4}, adapter=other)
    toy_trainer(run_dir=tmp_path / "c", full=True)
    different = compare_configs(tmp_path)
    assert sorted(different) == ["adapter.dropout", *ADAPTER_COLUMNS, "network.rope_theta"]
    assert different["network.rope_theta"].to_dict() == {"a": 1e4, "b": 5e4, "c": 1e4}
    assert different.loc["b", ADAPTER_COLUMNS].to_list() == ["DoRA", 2, 4]
    assert different.loc["c", ADAPTER_COLUMNS].isna().all()  # all of it trains


def test_states(tmp_path):
    toy_run(tmp_path / "finished")
    toy_run(tmp_path / "stopped", 2, total=5)
    toy_run(tmp_path / "empty", 0)
    held = RunFolder(tmp_path / "running", {"a": 1})
    error = "cell [3] failed:\n\x1b[31m<b>"
    write_job(tmp_path / "sweep" / "failed", "failed", error=error, parameters={"rank": 2})
    write_job(toy_run(tmp_path / "sweep" / "killed", 2, total=5), "killed")
    write_job(toy_run(tmp_path / "sweep" / "left", 5), "running")  # and nobody is at it
    write_job(tmp_path / "sweep" / "begun", "running")
    write_job(tmp_path / "sweep" / "waits", "waiting")
    write_job(tmp_path / "sweep" / "given up", "cancelled")
    write_job(tmp_path / "sweep" / "done", "finished")
    toy_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    table = runs(tmp_path).set_index("name")
    assert table.state.to_dict() == {
        "finished": "finished",
        "stopped": "stopped",
        "empty": "empty",
        "running": "running",
        "sweep/failed": "failed",
        "sweep/killed": "failed",
        "sweep/left": "stopped",
        "sweep/begun": "stopped",
        "sweep/waits": "empty",
        "sweep/given up": "stopped",
        "sweep/done": "finished",
        "damaged": "damaged",
    }
    assert table.problem["sweep/failed"] == "cell [3] failed:\\n\\x1b[31m<b>"
    assert table["parameters.rank"]["sweep/failed"] == 2
    assert "config.json is damaged" in table.problem["damaged"]
    assert table.problem.astype(bool).sum() == 2
    del held
    assert runs(tmp_path).set_index("name").state["running"] == "empty"


def test_asking_does_not_disturb_who_writes(tmp_path):
    before = RunFolder(tmp_path / "run", {})
    assert row_of(tmp_path).state == "running"
    before.append({"step": 1})  # which checks that the folder is still its own
    del before
    assert row_of(tmp_path).state == "stopped"
    assert RunFolder(tmp_path / "run", {}).is_mine


def test_a_writer_waits_for_a_reader_that_asks(tmp_path):
    toy_run(tmp_path / "run")
    handle = os.open(tmp_path / "run" / ".lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as `is_held` has it for a moment
    timer = threading.Timer(0.05, os.close, [handle])
    timer.start()
    assert RunFolder(tmp_path / "run", {}).is_mine
    timer.join()


def test_only_what_changed_is_read(tmp_path, monkeypatch):
    toy_run(tmp_path / "a"), toy_run(tmp_path / "b")
    first = runs(tmp_path)
    read = []
    own = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: read.append(str(path)) or own(path, *rest))
    pd.testing.assert_frame_equal(runs(tmp_path), first)
    assert not [path for path in read if "metrics" in path or "config" in path]
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows(4)[3]) + "\n")
    assert runs(tmp_path).steps.tolist() == [3, 4]
    assert {path for path in read if "metrics" in path} == {str(tmp_path / "b" / "metrics.jsonl")}


@pytest.mark.long
def test_of_ten_thousand_runs_only_what_changed_is_read(tmp_path, monkeypatch):
    metrics = "".join(json.dumps(row) + "\n" for row in rows(5))
    for number in range(10_000):
        folder = tmp_path / f"{number // 1000}" / f"{number:05d}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"number": number}))
        (folder / "metrics.jsonl").write_text(metrics)
    first, read, own = runs(tmp_path), [], index.read_record

    def read_record(root, name, *rest):
        read.append(name)
        return own(root, name, *rest)

    monkeypatch.setattr(index, "read_record", read_record)
    pd.testing.assert_frame_equal(runs(tmp_path), first)
    assert (len(first), first.steps.sum(), first.number.sum()) == (10_000, 50_000, 49_995_000)
    assert read == [], "the index knows them all"
    write_jsonl(tmp_path / "7" / "07000" / "metrics.jsonl", rows(9))
    assert runs(tmp_path).steps.sum() == 50_004
    assert read == ["7/07000"]


def test_an_index_that_is_not_refreshed_says_what_it_knew(tmp_path):
    toy_run(tmp_path / "a")
    runs(tmp_path)
    toy_run(tmp_path / "b")
    assert runs(tmp_path, refresh=False).name.tolist() == ["a"]
    assert runs(tmp_path).name.tolist() == ["a", "b"]
    (tmp_path / INDEX_NAME).unlink()
    assert len(runs(tmp_path, refresh=False)) == 2


def test_a_run_that_grows_is_read_from_where_it_was(tmp_path):
    folder, written = RunFolder(tmp_path / "run", {}), rows(30, loss=2.0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for number, row in enumerate(written, 1):
        row |= {"valid_loss": abs(12 - number) + 0.5, "tokens_per_second": float(number)}
        folder.append(row)
        if number % 7 == 0:
            with metrics.open("a") as file:  # half of the next one
                file.write(json.dumps(row)[:40])
            assert row_of(tmp_path).steps == number
            os.truncate(metrics, metrics.stat().st_size - 40)
    row = row_of(tmp_path)
    assert (row.steps, row.best_valid_loss, row.best_step) == (30, 0.5, 12)
    assert (row.seconds, row.tokens_per_second) == (15.0, 15.5)


def test_a_run_that_goes_on_from_a_checkpoint_is_read_anew(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    for row in rows(9, 20, step_seconds=1.0):
        folder.append(row)
    assert row_of(tmp_path).seconds == 9
    folder.cut(4)
    for row in rows(20, 20, step_seconds=2.0)[4:]:
        folder.append(row)
    assert (row_of(tmp_path).steps, row_of(tmp_path).seconds) == (20, 4 + 32)


def test_deleted_and_new_runs_are_seen(tmp_path):
    toy_run(tmp_path / "a"), toy_run(tmp_path / "deep" / "er" / "b")
    assert runs(tmp_path).name.tolist() == ["a", "deep/er/b"]
    shutil.rmtree(tmp_path / "a")
    toy_run(tmp_path / "c")
    assert runs(tmp_path).name.tolist() == ["c", "deep/er/b"]


def test_what_is_no_run_is_not_listed(tmp_path):
    toy_run(tmp_path / "run")
    toy_run(tmp_path / "run" / "inside")
    toy_run(tmp_path / "1" / "2" / "3" / "4" / "too deep")
    toy_run(tmp_path / ".trash-1"), toy_run(tmp_path / ".tmp-1")
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "letter.txt").write_text("mine")
    assert runs(tmp_path).name.tolist() == ["run"]


def test_a_run_itself_is_one_row_and_gets_no_index(tmp_path):
    folder = toy_run(tmp_path / "run")
    before = sorted(os.listdir(folder))
    table = runs(folder)
    assert (table.name.tolist(), table.folder.tolist()) == (["."], [str(folder)])
    assert sorted(os.listdir(folder)) == before


def test_no_folder_and_too_many_are_named(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="nowhere: cannot be listed"):
        runs(tmp_path / "nowhere")
    assert runs(tmp_path).empty
    assert compare_configs(tmp_path).empty
    for name in "abc":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(records, "MAX_FOLDERS", 2)
    with pytest.raises(RunError, match="more than 2 folders"):
        runs(tmp_path)


def test_only_what_differs_is_compared(tmp_path):
    toy_run(tmp_path / "a", learning_rate=1e-3)
    write_job(toy_run(tmp_path / "b", learning_rate=2e-3), parameters={"rank": 8})
    compared = compare_configs(tmp_path)
    assert compared.to_dict("list")["train.learning_rate"] == [1e-3, 2e-3]
    assert set(compared) == {"train.learning_rate", "parameters.rank"}
    assert compared.index.tolist() == ["a", "b"]
    table = runs(tmp_path)
    assert list(compare_configs(table[table.name == "a"])) == []


def test_a_truth_value_is_no_number(tmp_path):
    common = {"both": True, "none": None, "lost": math.nan}
    for name, flag, number in (("a", True, 1), ("b", 1, 1.0), ("c", True, None)):
        config = common | {"flag": flag, "number": number}
        (toy_run(tmp_path / name) / "config.json").write_text(json.dumps(config))
    table = runs(tmp_path)
    assert list(compare_configs(table)) == ["flag", "number"]
    assert list(compare_configs(table[table.name != "c"])) == ["flag"]
    assert list(compare_configs(table[table.name != "b"])) == ["number"]


def test_the_best_run(tmp_path):
    for name, accuracy in (("a", 0.25), ("b", 0.75), ("c", math.nan)):
        record_results(toy_run(tmp_path / name), accuracy=accuracy)
    table = runs(tmp_path)
    assert best_run(table, "accuracy").folder == str(tmp_path / "a")
    assert best_run(tmp_path, "result.accuracy", largest=True)["name"] == "b"
    with pytest.raises(ConfigError, match=r"no column 'acuracy'. Name one of accuracy"):
        best_run(table, "acuracy")
    with pytest.raises(ConfigError, match="model holds what is no number"):
        best_run(table, "model")
    with pytest.raises(RunError, match="no run has a best_valid_loss"):
        best_run(table)
    with pytest.raises(ConfigError, match="named by a text, not None"):
        best_run(table, None)
    with pytest.raises(ConfigError, match="the table has no name"):
        best_run(pd.DataFrame({"loss": [1]}), "loss")


def test_the_best_run_of_tables_that_were_put_together_is_one(tmp_path):
    for number, name in enumerate(("p/a", "p/b", "q/a", "q/b")):
        record_results(toy_run(tmp_path / name, number + 1), accuracy=number)
    table = pd.concat([runs(tmp_path / "q"), runs(tmp_path / "p")])
    assert table.index.tolist() == [0, 1, 0, 1]
    assert best_run(table, "accuracy").folder == str(tmp_path / "p" / "a")
    assert best_run(table, "steps", largest=True).folder == str(tmp_path / "q" / "b")


def test_results_are_merged(tmp_path):
    path = record_results(tmp_path / "new", accuracy=0.5, note="a")
    record_results(tmp_path / "new", accuracy=1, right=True)
    assert json.loads(path.read_text()) == {"accuracy": 1, "note": "a", "right": True}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    assert row_of(tmp_path, "new").state == "finished"


@pytest.mark.parametrize("value", [[1, 2], np.zeros(3), object(), b"x", "x" * 1001, 1j])
def test_what_is_no_result_is_refused(tmp_path, value):
    record_results(tmp_path, kept=1)
    with pytest.raises(ConfigError, match="accuracy"):
        record_results(tmp_path, accuracy=value)
    assert json.loads((tmp_path / "results.json").read_text()) == {"kept": 1}


def test_damaged_results_are_named_and_kept(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"results\.json: is not valid JSON"):
        record_results(tmp_path, accuracy=1)
    assert (tmp_path / "results.json").read_text() == "{"
    with pytest.raises(ConfigError, match="at most 200"):
        record_results(tmp_path / "b", **{f"n{n}": n for n in range(300)})
