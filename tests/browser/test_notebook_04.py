"""Notebook 04 as a reader runs it: Run All in JupyterLab, with widgets."""

from __future__ import annotations

from pathlib import Path

import nbformat
import papermill
import pytest

from tests.browser.lab import ROOT, Lab
from tests.browser.notebook_page import NotebookPage, wait_until
from tests.browser.watched import WIDGET_VIEW, saved_pictures

pytestmark = [pytest.mark.browser, pytest.mark.real]
NOTEBOOK = ROOT / "notebooks" / "04_watch_training.ipynb"
SECONDS = 240  # limit for the whole notebook with small parameters
VERDICT = "nbval-check-output"


def small_copy(folder: Path) -> tuple[str, list]:
    """The notebook without outputs and with its small parameters; its name and its cells."""
    small = nbformat.read(NOTEBOOK, as_version=4).metadata["workbench"]["small_parameters"]
    target = folder / NOTEBOOK.name
    papermill.execute_notebook(NOTEBOOK, target, small, prepare_only=True, progress_bar=False)
    notebook = nbformat.read(target, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, target)
    return target.name, notebook.cells


def verdict_of(notebook: nbformat.NotebookNode) -> list:
    """What the verdict cell shows."""
    (cell,) = [cell for cell in notebook.cells if VERDICT in cell.metadata.get("tags", [])]
    return [output.data["text/plain"] for output in cell.outputs]


def test_run_all_ends_with_the_committed_verdict_and_no_widget_in_the_file(
    browser, lab: Lab, usual_errors
):
    name, cells = small_copy(lab.work)
    page = NotebookPage(browser, lab, name)
    first = next(number for number, cell in enumerate(cells) if ".watch()" in cell.source)
    last = max(number for number, cell in enumerate(cells) if cell.cell_type == "code")
    page.watch(first)
    page.run_all()
    page.cell(first).get_by_role("button", name="Stop").wait_for(timeout=1000 * SECONDS / 2)
    wait_until(lambda: page.prompt(last).strip("[]:").isdigit(), SECONDS, "the last cell waits")
    page.save()
    page.close()
    lab.kill_kernels()
    saved = nbformat.read(page.path, as_version=4)
    assert verdict_of(saved) == verdict_of(nbformat.read(NOTEBOOK, as_version=4))
    for cell in saved.cells:
        outputs = cell.get("outputs", [])
        assert not [output for output in outputs if output.output_type == "error"]
        assert not any(WIDGET_VIEW in output.get("data", {}) for output in outputs)
        if ".watch()" in cell.source:
            assert len(saved_pictures(outputs)) == 1, cell.source
    assert set(page.errors) <= usual_errors
