"""Run a notebook with many combinations of parameters."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from workbench.errors import ConfigError, FileFormatError, check_number
from workbench.models.regular_files import open_regular, parse_json
from workbench.models.yaml_files import read_yaml
from workbench.runs.grids import Between, in_words, value_of, values_of
from workbench.runs.sweep import Sweep
from workbench.runs.sweep_runs import FINISHED, SweepRun
from workbench.runs.sweep_summary import write_summary

MAX_LIST_BYTES = 16_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command understands."""
    parser.add_argument("notebook", type=Path, help="has a cell tagged `parameters`")
    many = {"action": "append", "default": []}
    parser.add_argument(
        "-g",
        "--grid",
        nargs=2,
        metavar=("NAME", "VALUES"),
        help="a parameter and its values, parted by commas: -g rank 2,4,8; numbers, True, False, "
        "None, [lists] and {dicts} as in Python, anything else is a text",
        **many,
    )
    ends = {"nargs": 3, "metavar": ("NAME", "LOW", "HIGH"), **many}
    parser.add_argument(
        "--between", help="a parameter that is drawn for each of the --samples", **ends
    )
    parser.add_argument("--log-between", help="likewise, uniform in the logarithm", **ends)
    parser.add_argument(
        "--list", type=Path, help="YAML or JSON file: `runs`, a list of the runs' parameters"
    )
    parser.add_argument("--root", type=Path, help="default: runs/NOTEBOOK-sweep")
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time")
    parser.add_argument("--retries", type=int, default=1, help="further attempts at a failed run")
    parser.add_argument("--memory", type=float, metavar="GB", help="that each run takes")
    parser.add_argument("--samples", type=int, help="draw so many combinations of the grid")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--executor", help="`dask`, or a scheduler's address: tcp://host:8786")
    parser.add_argument(
        "--allow-changes", action="store_true", help="keep runs of another version of the notebook"
    )


def run(options: argparse.Namespace) -> int:
    """Run the sweep, a line an event; 1 if a run failed."""
    if options.memory is not None:
        check_number("--memory", options.memory, 0)
    sweep = Sweep(
        options.notebook,
        _given(options),
        options.root,
        at_once=options.at_once,
        retries=options.retries,
        memory=None if options.memory is None else int(options.memory * 1e9),
        executor=options.executor,
        samples=options.samples,
        seed=options.seed,
        allow_changes=options.allow_changes,
    )
    done = sum(run.state == FINISHED for run in sweep.runs)
    print(f"{len(sweep.runs)} runs in {sweep.root}, {done} finished before", flush=True)
    try:
        with contextlib.closing(iter(sweep)) as events:
            for event in events:
                if event is not None:
                    print(_line(event), flush=True)
    except KeyboardInterrupt:
        print("stopped: the same command goes on with what is left", file=sys.stderr)
        raise
    print(f"compared in {write_summary(sweep.root)}")
    return 1 if sweep.failures else 0


def _given(options: argparse.Namespace) -> object:
    """The grid, or the list of runs."""
    drawn = [(*ends, False) for ends in options.between] + [(*e, True) for e in options.log_between]
    if bool(options.list) == bool(options.grid or drawn):
        raise ConfigError("give either parameters or a list", cure="Use -g, --between, or --list.")
    if options.list:
        return _listed(options.list)
    axes = [(name, _values(name, text)) for name, text in options.grid]
    axes += [(n, Between(value_of(low), value_of(high), log)) for n, low, high, log in drawn]
    grid = dict(axes)
    if len(grid) < len(axes):
        twice = next(name for name in grid if [own for own, _ in axes].count(name) > 1)
        raise ConfigError(f"{twice} is there twice", cure="Part its values by commas.")
    return grid


def _values(name: str, text: str) -> list[object]:
    if text.strip().startswith(Between.__name__ + "("):
        cure = f"Use --between {name} LOW HIGH, or --log-between."
        raise ConfigError(f"-g {name} {text!r} would be texts, not a range", cure=cure)
    return values_of(text)


def _listed(path: Path) -> object:
    """The runs of a file: a JSON list, or a mapping with `runs`."""
    if path.suffix != ".json":
        content = read_yaml(path)
    else:
        with open_regular(path) as file:
            try:
                content = parse_json(file.read(MAX_LIST_BYTES))
            except ValueError as error:
                raise FileFormatError(f"is not valid JSON ({error})", where=path) from None
    runs = content.get("runs") if isinstance(content, dict) else content
    if not isinstance(runs, list):
        raise FileFormatError("holds no list `runs`", where=path)
    return runs


def _line(run: SweepRun) -> str:
    words = f"{time.strftime('%H:%M:%S')}  {run.state:9} {in_words(run.parameters)}"
    if run.attempts > 1:
        words += f"  attempt {run.attempts}"
    if run.result.seconds:
        words += f"  {run.result.seconds:.1f} s"
    for name, value in run.results.items() if run.state == FINISHED else ():
        words += f"  {name} {value:.4g}" if isinstance(value, float) else f"  {name} {value!r}"
    return words + (f"  {run.result.error!r}" if run.result.error else "")
