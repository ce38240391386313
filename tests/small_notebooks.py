"""Small notebooks for jobs and sweeps, and who runs them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_notebook

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def write_notebook(path: Path, parameters: str, *cells: str, tag: str = "parameters") -> Path:
    """A notebook whose first cell is tagged; returns its path."""
    notebook = new_notebook(cells=[new_code_cell(text) for text in (parameters, *cells)])
    notebook.cells[0].metadata["tags"] = [tag]
    notebook.metadata["kernelspec"] = KERNEL
    nbformat.write(notebook, path)
    return path


def processes_of(folder: Path) -> list[psutil.Process]:
    """The process that executes a run folder's notebook, and its kernel."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("JUPYTER_RUNTIME_DIR", "").startswith(str(folder.resolve())):
                found.append(process)
    return found
