"""Sweep over a notebook's parameters, with a table that shows each run while it goes."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from workbench.live.outputs import HTML, TEXT, Slot, kernel_shell, literal
from workbench.live.pace import Pace, in_words
from workbench.runs.sweep import Sweep
from workbench.runs.sweep_result import SweepResult
from workbench.runs.sweep_runs import FINISHED, RUNNING, WAITING, SweepRun
from workbench.runs.sweep_summary import write_summary

REFRESH_SECONDS, REFRESH_SHARE = 1.0, 0.02
MAX_ROWS = 60
COLORS = {FINISHED: "#2a9d8f", RUNNING: "#2f6fde", "failed": "#e05260", "killed": "#e05260"}
QUIET = "#7d8590"
CELL = "text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top"
ORDER = (RUNNING, "failed", "killed", FINISHED)  # what is shown first where not all can be


def sweep(
    notebook: str | os.PathLike,
    grid: Mapping[str, object] | Sequence[Mapping[str, object]],
    root: str | os.PathLike | None = None,
    *,
    summary: bool = True,
    **settings: object,
) -> SweepResult:
    """Run a notebook with many combinations of parameters; in a notebook, shows how they go.

    The same call again goes on: what has finished is skipped, what was killed goes on from its
    checkpoint. At the end an executed notebook, `summary.ipynb`, compares all runs of the root.

    Args:
        notebook: has a cell tagged `parameters`.
        grid: name → list of values, or a list of name → value.
        root: folder of the sweep; default `runs/<notebook>-sweep`.
        summary: write the notebook that compares the runs.
        settings: of `Sweep`: at_once, retries, memory, executor, seed, samples, allow_changes.

    Returns:
        the runs: `.table`, `.failures`, `.summary`.

    Raises:
        ConfigError: as `Sweep` does.
        RunError: as `Sweep` does; or the disk refuses a file: the sweep can go on later.
    """
    runs = Sweep(notebook, grid, root, **settings)
    table = SweepTable(runs) if kernel_shell() is not None else None
    try:
        with contextlib.closing(iter(runs)) as events:
            for _ in events:
                if table is not None:
                    table.refresh()
    finally:
        if table is not None:
            table.show()
    if summary:
        write_summary(runs.root)
    return SweepResult(runs.root, runs.runs)


class SweepTable:
    """The runs of a sweep in the output of a notebook's cell, updated in place."""

    def __init__(self, sweep: Sweep):
        self._sweep, self._slot = sweep, Slot()
        self._pace, self._began = Pace(REFRESH_SECONDS, REFRESH_SHARE), time.monotonic()

    def refresh(self) -> None:
        """Show how the runs are now, if it is time to."""
        if self._pace.due:
            self.show()

    def show(self) -> None:
        """Show how the runs are now."""
        with self._pace.spending():
            seconds = time.monotonic() - self._began
            text = _heading(self._sweep, seconds)
            self._slot.show({HTML: sweep_html(self._sweep, seconds), TEXT: text})


def sweep_html(sweep: Sweep, seconds: float) -> str:
    """The table as HTML: state, parameters, progress, loss, time, attempts, error of each run.

    Args:
        sweep: whose runs are shown, as they are now.
        seconds: since it began.
    """
    names = list({name: None for run in sweep.runs for name in run.parameters})
    heads = ["state", *names, "step", "loss", "time", "tries", "error"]
    head = "".join(f'<th style="{CELL}">{literal(name, 40)}</th>' for name in heads)
    shown = _chosen(sweep.runs)
    rows = "".join(_row(run, names) for run in shown)
    more = len(sweep.runs) - len(shown)
    left_out = f'<div style="color:{QUIET}">and {more} more</div>' if more else ""
    return (
        f"<div>{literal(_heading(sweep, seconds))}</div>"
        f'<table style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{left_out}"
    )


def _heading(sweep: Sweep, seconds: float) -> str:
    counts = Counter(run.state for run in sweep.runs)
    states = " · ".join(f"{count} {state}" for state, count in counts.items())
    return f"{len(sweep.runs)} runs of {sweep.notebook.name}: {states} · {in_words(seconds)}"


def _chosen(runs: list[SweepRun]) -> list[SweepRun]:
    """The runs to show, in their order: all, or first of all those that go or have failed."""
    if len(runs) <= MAX_ROWS:
        return runs
    rank = {state: number for number, state in enumerate(ORDER)}
    places = sorted(range(len(runs)), key=lambda at: rank.get(runs[at].state, len(ORDER)))
    return [runs[at] for at in sorted(places[:MAX_ROWS])]


def _row(run: SweepRun, names: list[str]) -> str:
    progress = run.progress if run.state != WAITING else {}
    loss = f"{progress['loss']:.4f}" if "loss" in progress else ""
    texts = [
        *(str(run.parameters.get(name, "")) for name in names),
        loss,
        in_words(run.seconds) if run.state != WAITING else "",
        str(run.attempts or ""),
        run.result.error,
    ]
    cells = [f'<span style="color:{COLORS.get(run.state, QUIET)}">{run.state}</span>']
    cells += [literal(text, 120) for text in texts]
    cells.insert(1 + len(names), _bar(progress))
    return "<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"


def _bar(progress: dict[str, float]) -> str:
    """Steps made of those to be made, as a bar and in numbers."""
    step, total = progress.get("step"), progress.get("total_steps")
    if step is None or not total:
        return ""
    share = min(1.0, max(0.0, step / total))
    return (
        f'<span style="display:inline-block;width:80px;height:.6em;background:{QUIET}44">'
        f'<span style="display:block;width:{share:.0%};height:100%;background:{COLORS[RUNNING]}">'
        f"</span></span> {step:.0f}/{total:.0f}"
    )
