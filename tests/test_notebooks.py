"""Every notebook: committed executed, runs with small parameters, and twice with equal verdicts."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.process import one_benchmark
from workbench.errors import ConfigError, RunError
from workbench.runs.notebooks import run_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUILD = ROOT / "build" / "tests"
CELL_SECONDS = 600  # limit for one cell
COMPANIONS = ("batch", "suites")  # folders that notebooks read from beside themselves
CHECKED, IGNORED = "nbval-check-output", "nbval-ignore-output"

each_notebook = pytest.mark.parametrize(
    "path",
    [  # two runs of one notebook write into the same folders
        pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem))
        for path in NOTEBOOKS
    ],
)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def compare_with_nbval(path: Path) -> None:
    """Execute a notebook anew and compare with what it holds."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval", str(path)]
    limits = [
        f"--nbval-cell-timeout={CELL_SECONDS}",
        "--rootdir",
        str(path.parent),
        "-c",
        os.devnull,
    ]
    result = subprocess.run([*command, *limits], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_committed_notebook_was_executed_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it has no figure"
    assert not any("widget-view" in kind for o in outputs for kind in o.get("data", {}))


@each_notebook
def test_committed_notebook_has_the_shape_that_readers_expect(path):
    cells = code_cells(path)
    assert tags(cells[0]) == ["parameters"]
    verdicts = [cell for cell in cells if CHECKED in tags(cell)]
    assert verdicts, "no verdict is checked"
    assert all(cell.outputs for cell in verdicts), "a verdict without output is checked by nobody"
    assert all(len(cell.source.splitlines()) <= 15 for cell in cells)
    assert sum(bool(re.search(r"^assert ", cell.source, re.M)) for cell in cells) >= 3
    assert all(set(tags(cell)) <= {"parameters", CHECKED, IGNORED} for cell in cells)


@each_notebook
def test_committed_notebook_names_no_place_of_this_machine(path):
    text = path.read_text(encoding="utf-8")
    assert str(Path.home()) + "/" not in text
    assert str(ROOT) not in text


def run_small(path: Path) -> Path:
    small = nbformat.read(path, as_version=4).metadata["workbench"]["small_parameters"]
    copy = run_notebook(path, BUILD / path.name, small)
    for name in COMPANIONS:  # nbval runs the copy where it lies
        shutil.copytree(path.parent / name, BUILD / name, dirs_exist_ok=True)
    return copy


@pytest.fixture(autouse=True)
def alone_if_it_measures(request):
    """The benchmark's notebook waits for other tests that measure."""
    measures = "09_benchmark" in request.node.name
    with one_benchmark() if measures else contextlib.nullcontext():
        yield


@each_notebook
def test_small_run_passes_its_own_assertions(path):
    verdicts = [cell for cell in code_cells(run_small(path)) if CHECKED in tags(cell)]
    assert verdicts
    assert all(cell.outputs for cell in verdicts)


@pytest.mark.long
@each_notebook
def test_second_small_run_agrees_with_the_first(path):
    copy = BUILD / path.name  # as `make test` left it, if nothing has changed since
    sources = [path, *(ROOT / "workbench").rglob("*.py")]
    changed = max(source.stat().st_mtime for source in sources)
    is_fresh = copy.is_file() and copy.stat().st_mtime > changed
    compare_with_nbval(copy if is_fresh else run_small(path))


@pytest.mark.long
@each_notebook
def test_default_run_agrees_with_what_is_committed(path):
    own_target = nbformat.read(path, as_version=4).metadata["workbench"].get("whole_run")
    if own_target:
        pytest.skip(f"takes more than ten minutes: {own_target}")
    compare_with_nbval(path)


def test_unknown_parameter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not a parameter.*preset"):
        run_notebook(NOTEBOOKS[0], tmp_path / "out.ipynb", {"prset": "short"})
    assert not list(tmp_path.iterdir())


def test_failing_cell_is_named_and_an_earlier_copy_is_kept(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    source, target = tmp_path / "bad.ipynb", tmp_path / "out.ipynb"
    nbformat.write(notebook, source)
    target.write_text("an earlier copy")
    with pytest.raises(RunError, match="ZeroDivisionError"):
        run_notebook(source, target)
    assert target.read_text() == "an earlier copy"
    assert (tmp_path / "out.failed.ipynb").exists()
