"""The notebook that compares a sweep's runs: written, then executed by papermill."""

from __future__ import annotations

import html
import os
from pathlib import Path

import pandas as pd

from workbench.models.files import replacing
from workbench.runs.sweep_result import SUMMARY, SweepResult, read_sweep

MAX_CURVES, MAX_MAPS = 40, 3
MAX_VALUES = 30  # of a parameter, in a heat map
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
READ = "import workbench as wb\n\nswept = wb.read_sweep('.')\nswept"
FAILURES = """for run in swept.failures:
    print(f"{run.folder.name}: {run.result.error}\\n{run.result.traceback}\\n")"""
CURVES = """from IPython.display import Image

runs = wb.runs('.')
Image(wb.draw_runs(runs[runs.steps > 0].head({most}), 'loss'))"""
HEAT_MAP = "Image(wb.draw_heat_map(runs, {x!r}, {y!r}, {value!r}))"


def write_summary(root: str | os.PathLike) -> Path:
    """Write `summary.ipynb` into a sweep's folder: table, failures with tracebacks, figures.

    Returns:
        the executed notebook, to be read by itself.

    Raises:
        RunError: there is no sweep, the notebook cannot be written, or a cell of it fails.
    """
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    from workbench.runs.notebooks import run_notebook  # papermill takes seconds to load

    swept = read_sweep(root)
    cells = [
        new_code_cell(text) if is_code else new_markdown_cell(text)
        for is_code, text in _cells(swept)
    ]
    target = Path(root) / SUMMARY
    with replacing(target) as path:
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)
    return run_notebook(target, target, quiet=True)


def _cells(swept: SweepResult) -> list[tuple[bool, str]]:
    """Each cell: whether it is code, and its text."""
    table, failed = swept.table, len(swept.failures)
    names = sorted({html.escape(run.notebook) for run in swept.runs})
    cells = [
        (False, f"# Sweep of <code>{'</code>, <code>'.join(names)}</code>\n\n{_counts(table)}"),
        (True, READ),
        (False, "## Every run, with its parameters and what it recorded"),
        (True, "swept.table"),
    ]
    if failed:
        cells += [(False, f"## {failed} failed, and why"), (True, FAILURES)]
    if table["loss"].notna().any():
        cells += [(False, "## The loss, step by step"), (True, CURVES.format(most=MAX_CURVES))]
        maps = [HEAT_MAP.format(x=x, y=y, value=value) for x, y, value in _maps(swept, table)]
        if maps:
            cells.append((False, "## What two parameters do together"))
            cells += [(True, text) for text in maps]
    return cells


def _counts(table: pd.DataFrame) -> str:
    states = ", ".join(f"{count} {state}" for state, count in table["state"].value_counts().items())
    return f"{len(table)} runs: {states}."


def _maps(swept: SweepResult, table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The two parameters that vary first, with each recorded number; without any, the loss."""
    names = {name: None for run in swept.runs for name in run.parameters}
    counts = {name: table[name].map(str).nunique() for name in names}
    varied = [name for name, count in counts.items() if 1 < count <= MAX_VALUES]
    if len(varied) < 2:
        return []
    y, x = (f"parameters.{name}" for name in varied[:2])
    recorded = {
        name: None
        for run in swept.runs
        for name, value in run.results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    values = [f"result.{name}" for name in recorded][:MAX_MAPS] or ["loss"]
    return [(x, y, value) for value in values]
