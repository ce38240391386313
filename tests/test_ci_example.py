"""The workflow for GitHub Actions that users copy: its steps run here as they do there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from workbench.blas import cache_folder
from workbench.doctor.installation import PROJECT

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "docs" / "ci_example" / "notebooks.yml"
CONTENT = yaml.load(WORKFLOW.read_text(encoding="utf-8"), yaml.BaseLoader)  # `on` stays a word
JOB = CONTENT["jobs"]["notebooks"]
COMPARE = "Compare with what is committed"
THERE = "Outputs that are to be checked are there"
RUN, SWEEP = "Run every notebook", "Sweep"


def code(source, *tags, shown=None):
    """A code cell that was executed; `shown` is what it displayed."""
    cell = nbformat.v4.new_code_cell(source, execution_count=1, metadata={"tags": list(tags)})
    if shown is not None:
        data = {"text/plain": shown}
        cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=1)]
    return cell


def write_notebook(path, shown="6"):
    """Training in small: parameters, an output that is compared, and one that is not."""
    cells = [
        code("steps = 3", "parameters"),
        code("print(steps)\nassert steps > 0", "nbval-ignore-output"),
        code("steps * 2", "nbval-check-output", shown=shown),
        code("import time; time.time()", shown="1.0"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def run_step(tmp_path):
    """Run a step by its name in a checkout of a user's, as GitHub's `shell: bash` does."""
    checkout = tmp_path / "my project"
    write_notebook(checkout / "notebooks" / "train.ipynb")
    cache = checkout / ".workbench-cache"
    cache.mkdir()
    (cache / "models").symlink_to(cache_folder() / "models")
    given = {
        name: value.replace("${{ github.workspace }}", str(checkout))
        for name, value in CONTENT["env"].items()
    }
    assert not any("${{" in value for value in given.values())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(name, **env):
        (step,) = [step for step in JOB["steps"] if step.get("name") == name]
        script = tmp_path / "step.sh"
        script.write_text(step["run"])
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=checkout,
            env={**os.environ, **given, "PATH": path, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
        )

    run.checkout = checkout
    return run


def test_actions_are_pinned_to_a_major_version_and_may_only_read():
    used = [step["uses"] for step in JOB["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)
    assert CONTENT["permissions"] == {"contents": "read"}


def test_it_runs_on_a_mac_and_on_linux_and_keeps_what_was_executed():
    assert {name.split("-")[0] for name in JOB["strategy"]["matrix"]["runner"]} == {
        "macos",
        "ubuntu",
    }
    assert JOB["runs-on"] == "${{ matrix.runner }}"
    (upload,) = [step for step in JOB["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "${{ !cancelled() }}"
    assert upload["with"]["path"] == "executed"
    (keep,) = [step for step in JOB["steps"] if step.get("uses", "").startswith("actions/cache")]
    assert CONTENT["env"]["WORKBENCH_CACHE"].endswith(keep["with"]["path"].split("/")[0])


def test_every_step_that_installs_nothing_is_run_here():
    named = [step["name"] for step in JOB["steps"] if "run" in step]
    assert named == ["Install", "Doctor", THERE, RUN, SWEEP, COMPARE]


def test_the_package_is_asked_for_by_its_name():
    (install,) = [step["run"] for step in JOB["steps"] if step.get("name") == "Install"]
    asked = re.search(r'"(.+)"', install)[1].replace("$WORKBENCH", CONTENT["env"]["WORKBENCH"])
    assert Requirement(asked).name == PROJECT
    assert Requirement(asked).url == CONTENT["env"]["WORKBENCH"]


@pytest.mark.long
def test_the_steps_pass_on_a_notebook_that_is_right(run_step, smollm2):
    for name in ("Doctor", THERE, RUN, COMPARE):
        done = run_step(name)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    executed = nbformat.read(run_step.checkout / "executed" / "train.ipynb", as_version=4)
    assert executed.cells[2].outputs[0].data["text/plain"] == "6"
    assert run_step(RUN, PARAMETERS="-p steps 5").returncode == 0
    executed = nbformat.read(run_step.checkout / "executed" / "train.ipynb", as_version=4)
    assert executed.cells[-2].outputs[0].data["text/plain"] == "10"
    done = run_step(SWEEP, SWEEP="notebooks/train.ipynb -g steps 2,4")
    assert done.returncode == 0, done.stderr
    assert len(list(run_step.checkout.glob("executed/sweep/*/notebook.ipynb"))) == 2


@pytest.mark.long
def test_the_steps_fail_on_a_notebook_that_is_wrong(run_step):
    path = run_step.checkout / "notebooks" / "train.ipynb"
    write_notebook(path, shown="7")
    done = run_step(COMPARE)
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    write_notebook(path, shown=None)
    done = run_step(THERE)
    assert done.returncode == 1
    assert "train.ipynb, cell 2: nothing to compare with" in done.stderr
    done = run_step(RUN, PARAMETERS="-p steps 0")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    assert (run_step.checkout / "executed" / "train.failed.ipynb").is_file()
