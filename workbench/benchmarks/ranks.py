"""One process with all cores, against ranks with a share of the BLAS threads each, in turn.

The baseline is what a user has without ranks: one process whose BLAS takes every core. On two
cores that is two threads, against two ranks with one BLAS thread each. A process that is held to
one thread would be a weaker baseline, and is not measured.

`python -m workbench.benchmarks.ranks --steps 8`
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.benchmarks.materials import Materials, own_folder
from workbench.benchmarks.training import Show, require_equal
from workbench.benchmarks.workers import Worker
from workbench.benchmarks.workloads import OURS, WORKLOADS, Workload
from workbench.runs.hosts import write_hosts
from workbench.runs.launching import rank_environment, threads_of_rank

COLUMNS = ["alone_seconds", "ranks_seconds", "alone_loss", "ranks_loss"]
STEPS = 8  # that count; one before them does not


@dataclass(frozen=True, eq=False)
class RankSpeed:
    """What each step took in one process with all cores, and over ranks that share them."""

    workload: Workload
    num_ranks: int
    threads: int  # of the BLAS in each rank; the one process has all cores
    steps: pd.DataFrame  # alone_seconds, ranks_seconds (of the slowest), losses; a row a step

    @property
    def ratio(self) -> float:
        """Median over the pairs of steps: how many times faster than one process with all cores."""
        return statistics.median(self.steps.alone_seconds / self.steps.ranks_seconds)

    def __str__(self) -> str:
        alone, ranks = self.steps.alone_seconds.median(), self.steps.ranks_seconds.median()
        threads = "one BLAS thread" if self.threads == 1 else f"{self.threads} BLAS threads"
        return (
            f"{self.workload.heading}: one process with all cores {alone:.3f} s a step, "
            f"{self.num_ranks} ranks with {threads} each {ranks:.3f} s; "
            f"{self.ratio:.2f} × (median of {len(self.steps)} pairs)"
        )


def compare_ranks(
    workload: Workload = WORKLOADS["W1"],
    num_ranks: int = 2,
    steps: int = STEPS,
    *,
    model: str = "smollm2-135m",
    layers: int | None = None,
    show: Show = lambda text: None,
) -> RankSpeed:
    """Train the same batches in one process with all cores and over ranks, a step of each in turn.

    Args:
        workload: whose batch the ranks can share.
        num_ranks: on this machine, each with its share of the BLAS threads.
        steps: that count.
        model: name or place of a Llama.
        layers: of it that are used, from the first; None for all.
        show: told what is being done.

    Raises:
        BenchmarkError: a process failed, or the ranks' loss is another.
    """
    per_epoch = -(-workload.rows // workload.batch_size)
    workload = dataclasses.replace(workload, epochs=-(-(steps + 1) // per_epoch))
    with own_folder() as folder, contextlib.ExitStack() as stack:
        job = Materials(folder, model, layers).write_job(workload)
        alone = list(_workers(1, stack))
        ranks = list(_workers(num_ranks, stack))
        for workers in (alone, ranks):
            _all(workers, "setup", path=str(job))
        rows = []
        for step in range(steps + 1):
            first = not step
            one, all_ranks = (_all(workers, "step", first=first) for workers in (alone, ranks))
            require_equal({OURS: one[0]["loss"], "ranks": all_ranks[0]["loss"]}, OURS)
            slowest = max(reply["seconds"] for reply in all_ranks)
            rows.append((one[0]["seconds"], slowest, one[0]["loss"], all_ranks[0]["loss"]))
            show(f"step {step} of {steps}: {rows[-1][0]:.3f} s alone, {slowest:.3f} s over ranks")
    table = pd.DataFrame(rows[1:], columns=COLUMNS)
    return RankSpeed(workload, num_ranks, threads_of_rank(num_ranks), table)


def _workers(num_ranks: int, stack: contextlib.ExitStack) -> Iterator[Worker]:
    private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="workbench-ranks-")))
    hosts = write_hosts(private, num_ranks)
    for rank in range(num_ranks):
        wanted = rank_environment(rank, num_ranks, hosts)
        new = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
        yield stack.enter_context(Worker(OURS, environment=new))


def _all(workers: Sequence[Worker], do: str, **values: object) -> list[dict]:
    """Ask all at once, and wait for all."""
    for worker in workers:
        worker.send(do, **values)
    return [worker.receive() for worker in workers]


def main() -> None:
    """Measure, and write the result to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    started = time.perf_counter()

    def show(text: str) -> None:
        sys.stderr.write(f"{time.perf_counter() - started:.0f} s: {text}\n")

    workload = WORKLOADS[options.workload]
    found = compare_ranks(workload, options.ranks, options.steps, model=options.model, show=show)
    sys.stdout.write(f"{found.steps.to_string()}\n{found}\n")


if __name__ == "__main__":
    main()
