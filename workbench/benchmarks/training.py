"""Peers that train, stepped in turn: A B C A B C …"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from workbench.benchmarks.workers import Worker, is_slow_without_blas
from workbench.benchmarks.workloads import MLX_LM, MLX_LM_BLAS, OURS, TORCH_BF16, Workload
from workbench.errors import BenchmarkError

TOLERANCE = 1e-3  # nats that a peer's first loss may be away from ours
COARSE = 0.1  # the same for bfloat16 weights
Show = Callable[[str], None]
Measured = tuple[list[dict], dict[str, dict]]


def train_in_turn(workload: Workload, workers: Sequence[Worker], job: Path, show: Show) -> Measured:
    """Train the same batches with every peer.

    Returns:
        A row for each step of each peer (seconds, loss, peaks), and facts by peer (device, loss
        of the same rows before and after, …).

    Raises:
        BenchmarkError: a peer failed, or did not start from the same loss.
    """
    steps = len(json.loads(job.read_text(encoding="utf-8"))["batches"])
    limits = {w.peer: _limit(workload, w.peer, steps) for w in workers}
    whole = [w for w in workers if limits[w.peer] == steps]
    show(f"{workload.name}: {len(workers)} peers load the weights")
    for worker in workers:
        worker.send("setup", path=str(job))
    facts = {w.peer: w.receive() for w in workers}
    for worker in workers:
        facts[worker.peer] |= worker.ask("describe")
    for worker in whole:
        facts[worker.peer]["loss_before"] = worker.ask("loss")["loss"]
    _require_same_start({peer: known.get("loss_before") for peer, known in facts.items()})
    raw, started = [], time.perf_counter()
    for step in range(steps):
        for worker in workers:
            if step < limits[worker.peer]:
                spent = time.perf_counter() - started
                show(f"{workload.name}: step {step + 1} of {steps}, {worker.peer} ({spent:.0f} s)")
                row = {"workload": workload.name, "peer": worker.peer, "step": step + 1}
                raw.append(row | worker.ask("step", first=not step))
            if step + 1 == limits[worker.peer] < steps:
                worker.close()  # its memory is for the others
        if not step:
            _require_same_first_step({row["peer"]: row["loss"] for row in raw})
    for worker in whole:
        facts[worker.peer]["loss_after"] = worker.ask("loss")["loss"]
    for row in raw:
        facts[row["peer"]]["peak_from"] = row.pop("peak_from")
    return raw, facts


def _limit(workload: Workload, peer: str, steps: int) -> int:
    """Steps that a peer makes; fewer than all only where the wheel's BLAS makes it very slow."""
    most = workload.most_steps.get(peer, steps) if is_slow_without_blas() else steps
    return min(steps, most)


def _require_same_start(losses: dict[str, float | None]) -> None:
    for peer, loss in losses.items():
        allowed = COARSE if peer == TORCH_BF16 else TOLERANCE
        if loss is not None and not abs(loss - losses[OURS]) <= allowed:
            raise BenchmarkError(
                f"starts from a loss of {loss:.5f}, ours from {losses[OURS]:.5f}: this is not the "
                "same work",
                where=peer,
            )


def _require_same_first_step(losses: dict[str, float]) -> None:
    # Both count the same targets; mlx-lm counts one of the padding as well.
    pair = losses.get(MLX_LM), losses.get(MLX_LM_BLAS)
    if None not in pair and not abs(pair[0] - pair[1]) <= TOLERANCE:
        raise BenchmarkError(
            f"reports {pair[0]:.5f} for the first step, with another BLAS {pair[1]:.5f}",
            where=MLX_LM,
        )
