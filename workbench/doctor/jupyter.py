"""Do kernels, papermill, widgets and pictures work?

Libraries are imported inside the checks: one that cannot be imported is that check's finding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workbench.doctor.installation import INSTALL
from workbench.doctor.records import FAILS, OK, WARNING, Record, Settings

MANAGER = "@jupyter-widgets/jupyterlab-manager"  # JupyterLab's side of ipywidgets
ASKED = {  # expressions that a kernel works out
    "sum": "1 + 1",
    "prefix": "__import__('os').path.realpath(__import__('sys').prefix)",
    "package": "getattr(__import__('importlib.util').util.find_spec('workbench'), 'origin', None)",
}
PNG_START = b"\x89PNG\r\n\x1a\n"


def check_kernel(settings: Settings) -> Record:
    """The kernel's spec is found; it starts, computes, and is this Python with this package."""
    from jupyter_client.kernelspec import KernelSpecManager

    name, known = settings.kernel, KernelSpecManager().find_kernel_specs()
    if name not in known:
        seen = f"no kernel {name!r}; there are {', '.join(sorted(known)) or 'none'}"
        cure = f"{sys.executable} -m ipykernel install --sys-prefix --name {name}"
        return Record("kernel", FAILS, seen, cure)
    told = _ask_kernel(name, settings.kernel_seconds)
    if told["sum"] != "2":
        return Record("kernel", FAILS, f"{name} says that 1 + 1 is {told['sum']}")
    if told["prefix"] != repr(os.path.realpath(sys.prefix)):
        seen = f"{name} is the Python in {told['prefix']}, not the one that runs here"
        cure = f"Remove {known[name]}, or choose a kernel of {sys.prefix} in your notebooks."
        return Record("kernel", WARNING, seen, cure)
    if told["package"] != repr(importlib.util.find_spec("workbench").origin):
        seen = f"{name} starts, but the workbench that it finds is {told['package']}, not this one"
        return Record("kernel", WARNING, seen, INSTALL.format(extra="dev"))
    return Record("kernel", OK, f"{name} starts and computes, and finds this workbench")


def _ask_kernel(name: str, seconds: float) -> dict[str, str]:
    """What a new kernel makes of the expressions in `ASKED`, as text.

    Raises:
        RuntimeError: it died, or did not start in time.
        TimeoutError: it did not answer in time.
    """
    from jupyter_client.manager import run_kernel

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = {"allow_stdin": False, "store_history": False, "timeout": seconds}
    with (
        tempfile.TemporaryDirectory() as folder,  # what lies here must not be found by chance
        run_kernel(kernel_name=name, startup_timeout=seconds, cwd=folder, **quiet) as client,
    ):
        reply = client.execute_interactive("", user_expressions=ASKED, **options)
    answers = reply["content"].get("user_expressions", {})
    return {
        asked: answers[asked]["data"]["text/plain"]
        if answers.get(asked, {}).get("status") == "ok"
        else "an error"
        for asked in ASKED
    }


def check_papermill(settings: Settings) -> Record:
    """A notebook of two cells runs with a parameter, and its copy holds the right output."""
    import nbformat

    from workbench.runs.notebooks import run_notebook

    cells = [nbformat.v4.new_code_cell(source) for source in ("number = 1", "number + 41")]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": settings.kernel, "display_name": settings.kernel}
    notebook.metadata["language_info"] = {"name": "python"}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "doctor.ipynb", Path(folder) / "executed.ipynb"
        nbformat.write(notebook, source)
        with _nothing_on_stderr():  # papermill's bar, and what the kernel warns of
            run_notebook(source, target, {"number": 2})
        outputs = nbformat.read(target, as_version=4).cells[-1].outputs
    texts = [output.get("data", {}).get("text/plain") for output in outputs]
    if texts != ["43"]:
        return Record("papermill", FAILS, f"a cell that should show 43 shows {texts}")
    return Record("papermill", OK, "runs a notebook with a parameter")


@contextlib.contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Drop what this process and its children write to stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def check_widgets(settings: Settings) -> Record:
    """JupyterLab has its side of ipywidgets, switched on: the live panel's buttons need both."""
    from jupyter_core.paths import jupyter_path
    from jupyterlab.commands import AppOptions, get_app_info

    told = get_app_info(AppOptions(labextensions_path=jupyter_path("labextensions")))
    found = told["federated_extensions"].get(MANAGER)
    if found is None:
        cure = f"{sys.executable} -m pip install --force-reinstall jupyterlab_widgets"
        return Record("widgets", FAILS, f"JupyterLab does not find {MANAGER}", cure)
    disabled = [name for name, value in told["disabled"].items() if value]
    switched_off = [name for name in disabled if name.split(":")[0] == MANAGER]
    if switched_off:
        cure = f"jupyter labextension enable {switched_off[0]}"
        return Record("widgets", FAILS, f"{switched_off[0]} is switched off in JupyterLab", cure)
    return Record("widgets", OK, f"{MANAGER} {found['version']} in JupyterLab")


def check_picture(settings: Settings) -> Record:
    """matplotlib draws a chart as PNG."""
    from workbench.live.figures import new_figure, png

    figure = new_figure(3, 2)
    figure.subplots().plot([1, 2, 3])
    picture = png(figure)
    if not picture.startswith(PNG_START):
        return Record("pictures", FAILS, "what matplotlib drew is no PNG")
    return Record("pictures", OK, f"matplotlib drew a chart of {len(picture) / 1e3:.0f} kB")
