"""The notebook that compares a sweep's runs: written, then executed by papermill."""

from __future__ import annotations

import html
import os
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.models.files import replacing
from workbench.runs.records import PARAMETER, RESULT
from workbench.runs.sweep_result import SUMMARY, SweepResult, read_sweep
from workbench.runs.table import runs

MAX_CURVES, MAX_MAPS = 40, 3
MAX_VALUES = 30  # of a parameter, in a heat map
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
READ = "import workbench as wb\n\nswept = wb.read_sweep('.')\nswept"
FAILURES = """for run in swept.failures:
    print(f"{run.folder.name}: {run.result.error}\\n{run.result.traceback}\\n")"""
FIGURES = """from IPython.display import Image

runs = wb.runs('.')


def figure(draw, *settings):
    try:
        return Image(draw(*settings))
    except Exception as error:
        print(f"Not drawn: {error}")"""  # whatever runs write, the rest of the summary is there
CURVES = "figure(wb.draw_runs, runs[runs.steps > 0].head({most}), 'loss')"
HEAT_MAP = "figure(wb.draw_heat_map, runs, {x!r}, {y!r}, {value!r})"


def write_summary(root: str | os.PathLike) -> Path:
    """Write `summary.ipynb` into a sweep's folder: table, failures with tracebacks, figures.

    A figure that cannot be drawn of what the runs wrote is left out; the notebook says why.

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
    known = runs(swept.root)  # of damaged metrics, what stands before the damage
    maps, has_loss = _maps(known), any(each["loss"].notna().any() for each in (table, known))
    if maps or has_loss:
        cells += [(False, "## Figures"), (True, FIGURES)]
    if has_loss:
        cells += [(False, _heading(known)), (True, CURVES.format(most=MAX_CURVES))]
    if maps:
        cells.append((False, "## What two parameters do together"))
        cells += [(True, HEAT_MAP.format(x=x, y=y, value=value)) for x, y, value in maps]
    return cells


def _counts(table: pd.DataFrame) -> str:
    states = ", ".join(f"{count} {state}" for state, count in table["state"].value_counts().items())
    return f"{len(table)} runs: {states}."


def _heading(table: pd.DataFrame) -> str:
    some = f", of {MAX_CURVES} runs" if (table["steps"] > 0).sum() > MAX_CURVES else ""
    return f"## The loss, step by step{some}"


def _maps(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The two parameters that vary first, with each recorded number; without any, the loss."""
    counts = {n: table[n].dropna().map(str).nunique() for n in table if n.startswith(PARAMETER)}
    varied = [name for name, count in counts.items() if 1 < count <= MAX_VALUES]
    if len(varied) < 2:
        return []
    recorded = [n for n in table if n.startswith(RESULT) and table[n].map(_is_number).any()]
    values = recorded[:MAX_MAPS] or (["loss"] if table["loss"].notna().any() else [])
    return [(varied[1], varied[0], value) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
