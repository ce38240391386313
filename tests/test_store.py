"""Run folders and metrics on disk."""

import dataclasses
import json

import pytest

import workbench as wb
from tests.process import finish, run, start
from tests.toy_runs import write_job
from workbench.errors import RunError
from workbench.runs.store import RunFolder, as_config, new_run, read_metrics
from workbench.tuning.config import TrainConfig

MAKE_RUNS = """
    import sys
    from workbench.runs.store import new_run
    for _ in range(30):
        print(new_run({root!r}, "run"))
"""

FULL_DISK = """
    import resource, sys
    from workbench.errors import RunError
    from workbench.runs.store import RunFolder
    run = RunFolder({folder!r}, {{}})
    run.append({{"step": 1}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))
    try:
        run.append({{"step": 2, "loss": 0.123456789, "grad_norm": 0.123456789}})
    except RunError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.append({{"step": 3}})
"""


def test_runs_are_numbered_and_made_at_once(tmp_path):
    folders = [new_run(tmp_path / "runs", "capitals") for _ in range(3)]
    assert [folder.name for folder in folders] == ["capitals-001", "capitals-002", "capitals-003"]
    assert all(folder.is_dir() for folder in folders)


def test_two_processes_never_get_the_same_folder(tmp_path):
    processes = [start(MAKE_RUNS.format(root=str(tmp_path))) for _ in range(2)]
    finished = [finish(process) for process in processes]
    assert [process.code for process in finished] == [0, 0], finished
    folders = [line for process in finished for line in process.out.splitlines()]
    assert len(folders) == len(set(folders)) == 60


def test_a_file_in_the_way_raises(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(RunError, match="runs"):
        new_run(tmp_path / "runs", "name")
    with pytest.raises(RunError, match="cannot be made"):
        new_run(tmp_path / "runs" / "deeper", "name")
    with pytest.raises(RunError, match="cannot be used as a run folder"):
        RunFolder(tmp_path / "runs" / "mine", {})
    assert (tmp_path / "runs").read_text() == "not a folder"


def test_a_new_run_takes_the_configuration_and_then_is_used(tmp_path):
    config = as_config(train=TrainConfig(steps=3), model="toy")
    folder = new_run(tmp_path, "run")
    RunFolder(folder, config)
    on_disk = json.loads((folder / "config.json").read_text())
    assert on_disk["model"] == "toy"
    assert on_disk["train"] == json.loads(json.dumps(dataclasses.asdict(TrainConfig(steps=3))))
    before = (folder / "config.json").read_bytes()
    assert RunFolder(folder, {}).goes_on
    assert (folder / "config.json").read_bytes() == before


def test_other_files_are_no_run(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds files, but no run.*wb\.new_run"):
        RunFolder(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_sweeps_folder_takes_a_run_beside_what_the_notebook_wrote(tmp_path):
    write_job(tmp_path, "running")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    for name in ("metrics.jsonl", "checkpoints"):  # which would mix with the run's
        (tmp_path / name).mkdir()
        with pytest.raises(RunError, match=f"holds files, but no run.*write {name} under another"):
            RunFolder(tmp_path, {})
        (tmp_path / name).rmdir()
    folder = RunFolder(tmp_path, {"a": 1})
    assert not folder.goes_on
    folder.append({"step": 1})
    assert read_metrics(tmp_path).step.tolist() == [1]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_lines_come_back_as_they_were_written(tmp_path):
    folder, rows = RunFolder(tmp_path / "run", {}), [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2}]
    for row in rows:
        folder.append(row)
    table = wb.read_metrics(tmp_path / "run")
    assert table.step.tolist() == [1, 2]
    assert table.loss[0] == 0.1 + 0.2


@pytest.mark.parametrize("half", ["{", '{"step": 2, "lo', '{"step": 2}'])
def test_a_last_line_without_its_end_is_left_out(tmp_path, half):
    RunFolder(tmp_path / "run", {}).append({"step": 1})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(half)
    assert read_metrics(tmp_path / "run").step.tolist() == [1]


def test_a_damaged_line_is_named(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    folder.append({"step": 3})
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: is damaged"):
        read_metrics(tmp_path / "run")


def test_no_metrics_raise(tmp_path):
    with pytest.raises(RunError, match=r"has no readable metrics\.jsonl"):
        read_metrics(tmp_path)


def test_a_full_disk_names_the_step_and_leaves_no_half_line(tmp_path):
    finished = run(FULL_DISK.format(folder=str(tmp_path / "run")))  # room for 30 bytes
    assert finished.code == 0, finished.err
    assert "row of step 2 cannot be written" in finished.out
    assert read_metrics(tmp_path / "run").step.tolist() == [1, 3]
