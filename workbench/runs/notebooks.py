"""Run notebooks through papermill, whole and with parameters that exist.

`python -m workbench.runs.notebooks notebooks/*.ipynb` executes notebooks in place.
"""

from __future__ import annotations

import argparse
import keyword
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import nbformat
import papermill
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.exceptions import PapermillExecutionError

from workbench.errors import ConfigError, RunError
from workbench.runs.grids import value_of


def run_notebook(
    source: str | os.PathLike,
    target: str | os.PathLike,
    parameters: Mapping[str, object] | None = None,
    *,
    echo: bool = False,
    quiet: bool = False,
) -> Path:
    """Execute a notebook and write the executed copy; cells run in the source's folder.

    Args:
        source: the notebook.
        target: where the executed copy goes; may be the source itself. It is replaced only when
            every cell ran; a failed run is kept beside it as `*.failed.ipynb`.
        parameters: values for names in the notebook's `parameters` cell.
        echo: pass on what the cells print, while they run; else show a bar.
        quiet: show no bar.

    Raises:
        ConfigError: a parameter that the notebook does not have.
        RunError: a cell failed; names the cell and the error.
    """
    source, target, parameters = Path(source), Path(target), dict(parameters or {})
    check_names(source, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as folder:
        executed = Path(folder) / target.name
        try:
            _execute(source, executed, parameters, echo, not (echo or quiet))
        except PapermillExecutionError as error:
            failed = target.with_suffix(".failed.ipynb")
            os.replace(executed, failed)
            raise RunError(
                f"cell [{error.exec_count}] failed with {error.ename}: {error.evalue}",
                where=source,
                cure=f"The run so far is in {failed}.",
            ) from None
        _without_traces(executed)
        os.replace(executed, target)
    return target


def _execute(
    source: Path, target: Path, parameters: Mapping[str, object], echo: bool, bar: bool
) -> None:
    papermill.execute_notebook(
        source,
        target,
        parameters,
        cwd=source.parent,
        progress_bar=bar,
        extra_arguments=["--log-level=ERROR"],  # the kernel's: it warns of TCP on this machine
        stdout_file=sys.stdout if echo else None,
        stderr_file=sys.stderr if echo else None,
    )


def check_names(source: Path, names: Iterable[str]) -> set[str]:
    """Check that a notebook has parameters of these names; returns the names of all it has.

    Raises:
        ConfigError: a name is not among those of its parameters cell, or it has no such cell.
        RunError: there is no such notebook, or the file is none.
    """
    if not source.is_file():
        raise RunError("no such notebook", where=source)
    try:
        notebook = nbformat.read(source, as_version=4)
        known = papermill.inspect_notebook(notebook)
    except Exception as error:  # nbformat and papermill raise what they meet in a damaged file
        raise RunError(f"is not a notebook ({str(error)[:200]})", where=source) from None
    for name in names:
        if not known:
            raise ConfigError(
                f"has no parameters, so that {name!r} cannot be set",
                where=source,
                cure="Tag the cell that sets them `parameters`.",
            )
        # papermill writes the name into the notebook as code.
        if not name.isidentifier() or keyword.iskeyword(name) or name not in known:
            raise ConfigError(
                f"{name!r} is not a parameter", where=source, cure=f"It has {', '.join(known)}."
            )
    return set(known)


def _without_traces(path: Path) -> None:
    """Join pieces of printed text; take out papermill's notes on times, paths and states."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook, _ = CoalesceStreamsPreprocessor(enabled=True)(notebook, {})
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
    nbformat.write(notebook, path)


def main() -> None:
    """Execute notebooks from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the executed copies; else in place")
    parser.add_argument("--echo", action="store_true", help="show what the cells print")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    for notebook in options.notebooks:
        target = options.out / notebook.name if options.out else notebook
        parameters = {name: value_of(value) for name, value in options.p}
        run_notebook(notebook, target, parameters, echo=options.echo)


if __name__ == "__main__":
    main()
