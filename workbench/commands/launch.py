"""`python -m workbench launch`: one training over several processes of this machine."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from workbench.errors import ConfigError, RankError, check_whole
from workbench.runs.grids import value_of
from workbench.runs.hosts import find_ports
from workbench.runs.launching import Limits, run_ranks
from workbench.runs.store import new_run
from workbench.tuning.interrupts import orderly_exit

KINDS = {".ipynb": "notebook", ".yaml": "yaml", ".yml": "yaml", ".py": "script"}
WARNING = (
    "The ranks talk over 127.0.0.1 without authentication: other users of this machine could "
    "connect."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    limits = Limits()
    parser.description = "Run a notebook, a YAML of mlx_lm.lora or a script as several ranks."
    parser.add_argument("job", type=Path, help="*.ipynb, *.yaml or *.py; it calls wb.join_ranks()")
    parser.add_argument("arguments", nargs="*", help="of a script, after --")
    parser.add_argument("-n", "--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebook",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for logs and results (default: launches/NAME-001)"
    )
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=limits.start_timeout,
        metavar="S",
        help="seconds until all ranks have joined (default: %(default)g; 0: no limit)",
    )
    parser.add_argument(
        "--silence",
        type=float,
        default=limits.silence,
        metavar="S",
        help="seconds that a rank may wait for another (default: %(default)g; 0: no limit)",
    )
    parser.add_argument("--port", type=int, help="of rank 0, the others have the next ones")


def run(options: argparse.Namespace) -> int:
    """Run the job; returns the status of the rank that failed, or 0."""
    kind = KINDS.get(options.job.suffix)
    _check(options, kind)
    limits = Limits(options.start_timeout, options.silence, options.port)
    find_ports(options.ranks, options.port)
    out = options.out or new_run("launches", options.job.stem)
    print(f"{options.ranks} ranks of {options.job}, logs in {out}. {WARNING}", flush=True)
    try:
        with orderly_exit():
            run_ranks(_command(options, kind, out), options.ranks, out, limits)
    except RankError as error:
        print(error, file=sys.stderr)
        return error.status
    for rank in range(1, options.ranks):
        shutil.rmtree(_place(out, rank), ignore_errors=True)
    print(f"All {options.ranks} ranks are done: {out}")
    return 0


def _check(options: argparse.Namespace, kind: str | None) -> None:
    if kind is None or not options.job.is_file():
        what = "no such file" if kind else f"{options.job.suffix or 'a file without ending'}"
        cure = f"Give a file that ends in {', '.join(KINDS)}."
        raise ConfigError(what if kind else f"cannot run {what}", where=options.job, cure=cure)
    if options.p and kind != "notebook":
        raise ConfigError("-p is for the parameters of a notebook", where=options.job)
    if options.arguments and kind != "script":
        raise ConfigError("arguments are for a script", where=options.job)
    check_whole("num_ranks", options.ranks, 1)
    if kind == "notebook":
        from workbench.runs.notebooks import check_parameters  # papermill takes seconds to load

        check_parameters(options.job, [(name, value_of(text)) for name, text in options.p])


def _command(options: argparse.Namespace, kind: str, out: Path) -> Callable[[int], list[str]]:
    job = str(options.job)

    def command(rank: int) -> list[str]:
        if kind == "script":
            return [sys.executable, job, *options.arguments]
        if kind == "yaml":
            return [sys.executable, "-m", "workbench.commands.yaml_rank", job, str(out / "run")]
        parameters = [part for pair in options.p for part in ("-p", *pair)]
        place = ["--echo", "--out", str(_place(out, rank))]
        return [sys.executable, "-m", "workbench.runs.notebooks", job, *place, *parameters]

    return command


def _place(out: Path, rank: int) -> Path:
    """Where a rank's executed notebook goes: rank 0's is kept, the others' if the run failed."""
    return out / f"rank-{rank}" if rank else out
