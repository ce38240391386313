"""The benchmark: weights that all peers load, and one workload after the other."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import ClassVar

import pandas as pd

from workbench.benchmarks.materials import Materials, own_folder
from workbench.benchmarks.serving import serve_in_turn
from workbench.benchmarks.summary import Comparison
from workbench.benchmarks.training import train_in_turn
from workbench.benchmarks.workers import Worker, left_out
from workbench.benchmarks.workloads import OURS, PEERS, WORKLOADS, Workload
from workbench.errors import BenchmarkError, ConfigError

Show = Callable[[str], None]


class Benchmark:
    """Holds the weights that all peers load; a context manager, or call `close` at the end.

    There is one at a time: a new one closes the one that this process had before.

    Args:
        model: name or place of a Llama-family model.
        layers: of it that are used, from the first; None for all.
        peers: that take part beside ours, of those that can; `left_out` says which cannot, and why.
        show: is called with a line on what is running now; may be replaced.

    Raises:
        BenchmarkError: another process runs a benchmark on this machine.
        ConfigError: an unknown peer.
    """

    _open: ClassVar[Benchmark | None] = None

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        layers: int | None = None,
        peers: Iterable[str] = PEERS,
        show: Show = lambda text: None,
    ):
        wanted = {OURS, *peers}
        unknown = sorted(wanted - set(PEERS))
        if unknown:
            raise ConfigError(f"no peers {unknown}", cure=f"There are {', '.join(PEERS)}.")
        self.left_out = {p: reason for p, reason in left_out().items() if p in wanted}
        self.peers = tuple(p for p in PEERS if p in wanted and p not in self.left_out)
        self.show, self._stack = show, contextlib.ExitStack()
        if Benchmark._open is not None:
            Benchmark._open.close()
        self._materials = Materials(self._stack.enter_context(own_folder()), model, layers)
        Benchmark._open = self
        atexit.register(self.close)  # a notebook may end before its last cell

    def __enter__(self) -> Benchmark:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the weights from the disk, and let another benchmark begin."""
        if Benchmark._open is self:
            Benchmark._open = None
        self._stack.close()

    def run(self, workload: str | Workload, **changes: object) -> Comparison:
        """Measure one workload.

        Args:
            workload: its name, or one of your own.
            changes: of its fields, such as rows=16 or epochs=1.

        Raises:
            BenchmarkError: this one is closed, or a peer died, hung or starts from another loss.
        """
        if Benchmark._open is not self:
            raise BenchmarkError("this benchmark is closed", cure="Open a new one.")
        known = WORKLOADS[workload] if isinstance(workload, str) else workload
        workload = dataclasses.replace(known, **changes)
        started = time.perf_counter()
        self.show(f"{workload.name}: weights and rows")
        serves = workload.kind == "serve"
        given = self._materials.model() if serves else self._materials.write_job(workload)
        measure = serve_in_turn if serves else train_in_turn
        with contextlib.ExitStack() as stack:
            peers = [peer for peer in self.peers if peer in workload.peers]
            workers = [stack.enter_context(Worker(peer)) for peer in peers]
            raw, facts = measure(workload, workers, given, self.show)
        seconds = time.perf_counter() - started
        self.show(f"{workload.name}: done in {seconds:.0f} s")
        out = {p: reason for p, reason in self.left_out.items() if p in workload.peers}
        return Comparison(workload, pd.DataFrame(raw), pd.DataFrame(facts).T, out, seconds)
