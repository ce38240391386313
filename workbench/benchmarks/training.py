"""Peers that train, stepped in turn: A B C A B C …"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
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
    # Where rows are padded, mlx-lm's own loss counts a target of the padding: so they are asked.
    asked = [w for w in workers if workload.kind == "chat" and limits[w.peer] == steps]
    show(f"{workload.name}: {len(workers)} peers load the weights")
    facts = _set_up(workers, job)
    for worker in asked:
        facts[worker.peer]["loss_before"] = worker.ask("loss")["loss"]
    require_equal({w.peer: facts[w.peer]["loss_before"] for w in asked}, OURS)
    raw, started = [], time.perf_counter()
    for step in range(steps):
        turn = [worker for worker in workers if step < limits[worker.peer]]
        for worker in turn:
            spent = time.perf_counter() - started
            show(f"{workload.name}: step {step + 1} of {steps}, {worker.peer} ({spent:.0f} s)")
            row = {"workload": workload.name, "peer": worker.peer, "step": step + 1}
            raw.append(row | worker.ask("step", first=not step))
        for worker in turn:
            if step + 1 == limits[worker.peer] < steps:
                worker.close()  # its memory is for the others
        if not step:
            _check_first_losses({row["peer"]: row["loss"] for row in raw}, workload.kind)
    for worker in asked:
        facts[worker.peer]["loss_after"] = worker.ask("loss")["loss"]
    for row in raw:
        facts[row["peer"]]["peak_from"] = row.pop("peak_from")
    return raw, facts


def _set_up(workers: Sequence[Worker], job: Path) -> dict[str, dict]:
    """All at once; what they measure of the machine, one after the other."""
    for worker in workers:
        worker.send("setup", path=str(job))
    facts = {worker.peer: worker.receive() for worker in workers}
    return {worker.peer: facts[worker.peer] | worker.ask("describe") for worker in workers}


def _limit(workload: Workload, peer: str, steps: int) -> int:
    """Steps that a peer makes; fewer than all only where the wheel's BLAS makes it very slow."""
    most = workload.most_steps.get(peer, steps) if is_slow_without_blas() else steps
    return min(steps, most)


def _check_first_losses(losses: dict[str, float], kind: str) -> None:
    # mlx-lm counts a target of the padding as well: its two forms agree with each other.
    mlx_lm = {peer: losses[peer] for peer in (MLX_LM_BLAS, MLX_LM) if peer in losses}
    if kind == "text":
        require_equal(losses, OURS)
    elif len(mlx_lm) == 2:
        require_equal(mlx_lm, MLX_LM_BLAS)


def require_equal(losses: Mapping[str, float], reference: str) -> None:
    """Refuse peers whose first loss is not that of the reference; bfloat16 may be further away.

    Raises:
        BenchmarkError: names the peer and both losses.
    """
    for peer, loss in losses.items():
        allowed = COARSE if peer == TORCH_BF16 else TOLERANCE
        if not abs(loss - losses[reference]) <= allowed:
            raise BenchmarkError(
                f"starts from a loss of {loss:.5f}, {reference} from {losses[reference]:.5f}: "
                "this is not the same work",
                where=peer,
            )
