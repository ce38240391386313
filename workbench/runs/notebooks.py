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
from workbench.runs.execution import WHOLE_OUTPUT
from workbench.runs.grids import value_of

TRUTH_VALUES = ("True", "False")
MEANT_AS_THEM = {"true", "false", "yes", "no", "on", "off"}  # and are all true, as texts


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
        ConfigError: as `check_parameters` does.
        RunError: a cell failed; names the cell and the error.
    """
    source, target, parameters = Path(source), Path(target), dict(parameters or {})
    check_parameters(source, parameters.items())
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
        **WHOLE_OUTPUT,
        extra_arguments=["--log-level=ERROR"],  # the kernel's: it warns of TCP on this machine
        stdout_file=sys.stdout if echo else None,
        stderr_file=sys.stderr if echo else None,
    )


def check_parameters(source: Path, given: Iterable[tuple[str, object]]) -> set[str]:
    """Check that a notebook has such parameters; returns the names of all it has.

    Args:
        source: the notebook.
        given: names and the values that they shall get.

    Raises:
        ConfigError: a name is not among those of its parameters cell, or it has no such cell; or
            a text such as "false" is for one that is True or False.
        RunError: there is no such notebook, or the file is none.
    """
    known = _parameters_of(source)
    for name, value in given:
        if not known:
            raise ConfigError(
                f"has no parameters, so that {name!r} cannot be set",
                where=source,
                cure="Tag the cell that sets them `parameters`; it sets each on a line of its own.",
            )
        # papermill writes the name into the notebook as code.
        if not name.isidentifier() or keyword.iskeyword(name) or name not in known:
            raise ConfigError(
                f"{name!r} is not a parameter", where=source, cure=f"It has {', '.join(known)}."
            )
        meant = isinstance(value, str) and value.strip().lower() in MEANT_AS_THEM
        if meant and known[name] in TRUTH_VALUES:
            what = f"{name} is {known[name]} there, and {value!r} would be a text, which is true"
            raise ConfigError(what, where=source, cure="Write True or False.")
    return set(known)


def _parameters_of(source: Path) -> dict[str, str]:
    """Names of a notebook's parameters, and what its cell sets them to, as code."""
    if not source.is_file():
        raise RunError("no such notebook", where=source)
    try:
        notebook = nbformat.read(source, as_version=4)
        found = papermill.inspect_notebook(notebook)
    except Exception as error:  # nbformat and papermill raise what they meet in a damaged file
        raise RunError(f"is not a notebook ({str(error)[:200]})", where=source) from None
    return {name: parameter["default"] for name, parameter in found.items()}


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
