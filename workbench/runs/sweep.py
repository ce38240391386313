"""Many runs of one notebook, each with its parameters in a folder of its own, by papermill."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from workbench.backend import usable_cores
from workbench.errors import ConfigError, RunError, check_whole
from workbench.models.regular_files import open_regular, parse_json
from workbench.runs import lock
from workbench.runs.executors import LocalExecutor
from workbench.runs.grids import combinations, folder_name
from workbench.runs.jobs import Executor, Job, JobResult, unwritable
from workbench.runs.memory_budget import MemoryBudget, MemoryNeed
from workbench.runs.store import JOB_NAME
from workbench.runs.sweep_runs import (
    CANCELLED,
    FINISHED,
    RUNNING,
    WAITING,
    SweepRun,
    read_sweep_run,
)

RUN_DIR = "run_dir"  # a notebook's parameter of this name gets the run folder
SOURCE = ".source"  # of the root; holds the notebook as the sweep found it
TICK_SECONDS = 1.0
MAX_NOTEBOOK_BYTES = 64_000_000


class Sweep:
    """Runs a notebook with many combinations of parameters. The sweep yields; callers observe.

    Iterate over it: each item is a `SweepRun` whose state has changed, or None when a second went
    by without one. Each run has its own folder in `root`, named by its parameters; a notebook with
    a parameter `run_dir` gets that folder, and its trainer goes on from the checkpoint there. The
    same sweep again skips what has finished and starts the rest. Leaving the loop, as an interrupt
    does, ends what runs, kernels included.

    Args:
        notebook: has a cell tagged `parameters`.
        grid: name → list of values, or a list of name → value; see `combinations`.
        root: folder of the sweep; default `runs/<notebook>-sweep`.
        at_once: runs at the same time, which share the cores; not for an executor.
        retries: further attempts at a run that failed.
        memory: bytes a run takes, or a function of its parameters, such as
            `lambda p: wb.plan_memory(…).peak_bytes`; None: what the largest so far took, each
            alone until one has finished.
        executor: where the runs go: a dask client, "dask" or a scheduler's address (see
            `cluster`), or an `Executor`; None: this machine.
        seed: of the draw of `samples`.
        samples: draw so many combinations of the grid.
        allow_changes: keep runs that another version of the notebook finished.

    Raises:
        ConfigError: parameters that the notebook does not have (see `check_parameters`), nothing
            to run, the same run twice, a run that does not fit into memory, or runs of another
            version of the notebook.
        RunError: no such notebook, or the root cannot be used, or another process sweeps there.
    """

    def __init__(
        self,
        notebook: str | os.PathLike,
        grid: Mapping[str, object] | Sequence[Mapping[str, object]],
        root: str | os.PathLike | None = None,
        *,
        at_once: int = 1,
        retries: int = 1,
        memory: MemoryNeed = None,
        executor: object | None = None,
        seed: int = 0,
        samples: int | None = None,
        allow_changes: bool = False,
    ):
        check_whole("at_once", at_once, 1)
        check_whole("retries", retries, 0)
        self.notebook, self.retries, self.executor = Path(notebook), retries, executor
        self.root = Path(root) if root is not None else Path("runs") / f"{self.notebook.stem}-sweep"
        chosen = combinations(grid, samples, seed)
        self._takes_folder = RUN_DIR in _parameters_of(self.notebook, chosen)
        code = _digest(self.notebook)
        self.runs = [_find_run(self.root, self.notebook, code, each) for each in chosen]
        if not allow_changes:
            self._refuse_mixture(code)
        self._waiting = [run for run in self.runs if run.state != FINISHED]
        for run in self._waiting:
            run.attempts, run.result = 0, JobResult(WAITING, peak_bytes=run.result.peak_bytes)
        self._at_once, self._need = at_once, memory
        self._memory: MemoryBudget | None = None
        if executor is None or hasattr(executor, "shares_memory"):  # a cluster tells later
            self._count_memory(executor)
        self._running: dict[Future[JobResult], SweepRun] = {}

    @property
    def failures(self) -> list[SweepRun]:
        """Runs that have ended without success."""
        return [r for r in self.runs if r.state not in (FINISHED, WAITING, RUNNING, CANCELLED)]

    def __iter__(self) -> Iterator[SweepRun | None]:
        if not self._waiting:
            return  # a cluster need not be there
        with self._holding(), self._executing() as executor:
            while self._waiting or self._running:
                yield from self._start(executor)
                done, _ = concurrent.futures.wait(
                    self._running, TICK_SECONDS, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    yield self._take_in(future)
                if not done:
                    yield None

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """The root is ours, and keeps the notebook as it is now: all runs get the same."""
        source = self.root / SOURCE
        try:
            source.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.root, error) from None
        with lock.held(self.root, 0):
            try:
                new = source / f".{self.notebook.name}"
                shutil.copyfile(self.notebook, new)
                os.replace(new, source / self.notebook.name)
            except OSError as error:
                raise unwritable(self.root, error) from None
            yield

    @contextlib.contextmanager
    def _executing(self) -> Iterator[Executor]:
        """The executor; what still runs at the end is ended."""
        executor = self.executor
        if executor is None:
            executor = LocalExecutor(self._at_once)
        elif not hasattr(executor, "shares_memory"):
            from workbench.runs.cluster import on_cluster  # the extra `cluster`

            executor = on_cluster(executor, self.root, self._at_once)
            self._count_memory(executor)
        self._at_once = executor.at_once
        try:
            yield executor
        finally:
            self._abandon(executor)
            if executor is not self.executor:
                executor.close()

    def _count_memory(self, executor: Executor | None) -> None:
        if executor is None or executor.shares_memory:
            self._memory = MemoryBudget(self._need, self.runs)

    def _start(self, executor: Executor) -> Iterator[SweepRun]:
        """Start what waits, as far as there is room."""
        slots = max(1, min(self._at_once, len(self._waiting) + len(self._running)))
        for run in list(self._waiting):
            if len(self._running) >= self._at_once:
                return
            if self._memory and not self._memory.fits(run, self._running.values()):
                continue
            self._waiting.remove(run)
            run.begin()
            self._running[executor.submit(self._job(run, slots))] = run
            yield run

    def _job(self, run: SweepRun, slots: int) -> Job:
        own = {RUN_DIR: str(run.folder.resolve())} if self._takes_folder else {}
        return Job(
            notebook=(self.root / SOURCE / self.notebook.name).resolve(),
            parameters={**run.parameters, **own},
            folder=run.folder.resolve(),
            threads=max(1, usable_cores() // slots),
            cwd=self.notebook.parent.resolve(),
        )

    def _take_in(self, future: Future[JobResult]) -> SweepRun:
        """A run's attempt has ended: write it down, or try again."""
        run = self._running.pop(future)
        run.result = future.result()
        run.save()
        if self._memory:
            self._memory.learn(run)
        if run.state not in (FINISHED, CANCELLED) and run.attempts <= self.retries:
            self._waiting.append(run)
        return run

    def _abandon(self, executor: Executor) -> None:
        """End what still runs; after the loop's own end there is nothing."""
        if not self._running:
            return
        executor.cancel()
        for future, run in self._running.items():
            with contextlib.suppress(Exception):  # what stopped the sweep is already on its way
                run.result = future.result()
                run.save()
        self._running = {}

    def _refuse_mixture(self, code: str) -> None:
        other = [run for run in self.runs if run.state == FINISHED and run.code != code]
        if other:
            raise ConfigError(
                f"{len(other)} of {len(self.runs)} runs were finished by another version of "
                f"{self.notebook.name}",
                where=self.root,
                cure="Keep them with allow_changes=True, or give the sweep a new root.",
            )


def _parameters_of(notebook: Path, chosen: list[dict[str, object]]) -> set[str]:
    """Names of the notebook's parameters, which can be all that is chosen."""
    from workbench.runs.notebooks import check_parameters  # papermill takes seconds to load

    if any(RUN_DIR in run for run in chosen):
        raise ConfigError(
            f"{RUN_DIR!r} is the run's folder, which the sweep chooses", cure="Choose the root."
        )
    return check_parameters(notebook, [pair for run in chosen for pair in run.items()])


def _digest(notebook: Path) -> str:
    """SHA-256 of the code cells: what they printed, and texts between them, may change."""
    with open_regular(notebook, kind=RunError) as file:
        content = parse_json(file.read(MAX_NOTEBOOK_BYTES))
    cells = [cell for cell in content["cells"] if cell.get("cell_type") == "code"]
    sources = ["".join(cell.get("source", "")) for cell in cells]
    return hashlib.sha256("\0".join(sources).encode("utf-8", "surrogatepass")).hexdigest()


def _find_run(root: Path, notebook: Path, code: str, parameters: dict[str, object]) -> SweepRun:
    """The run of these parameters, as an earlier sweep left it, or a new one."""
    folder = root / folder_name(parameters)
    if not os.path.lexists(folder / JOB_NAME):
        return SweepRun(folder, notebook.name, code, parameters)
    run = read_sweep_run(folder)
    if run.parameters != parameters:
        raise RunError("is of other parameters than its name says", where=folder / JOB_NAME)
    if run.state != FINISHED:
        run.notebook, run.code = notebook.name, code
    return run
