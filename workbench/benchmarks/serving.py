"""Peers that load and generate, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from workbench.benchmarks.workers import Worker
from workbench.benchmarks.workloads import Workload

MAX_TOKENS = 64
SUBJECTS = (  # long answers: none ends within the tokens that are asked for
    "the sea",
    "a mountain railway",
    "the history of bread",
    "how bees live",
    "an old library",
    "the city of Lima",
    "the moon",
    "learning to play the violin",
)
PROMPTS = [f"Write a long essay about {subject}." for subject in SUBJECTS]


def serve_in_turn(
    workload: Workload,
    workers: Sequence[Worker],
    model: Path,
    show: Callable[[str], None],
) -> tuple[list[dict], dict[str, dict]]:
    """Load, then generate one answer and eight together, `workload.epochs` times.

    The first load of each process is not counted: it imports what is needed and warms the disk.

    Returns:
        A row for each turn of each peer (what, seconds, tokens), and facts by peer.
    """
    for worker in workers:
        worker.send("load", model=str(model))
    for worker in workers:
        worker.receive()
    facts = {worker.peer: worker.ask("describe") for worker in workers}
    raw = []
    asked = (
        ("load", "load", {"model": str(model)}),
        ("generate 1", "generate", {"prompts": PROMPTS[:1], "max_tokens": MAX_TOKENS}),
        ("generate 8", "generate", {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}),
    )
    for what, do, values in asked:
        for turn in range(workload.epochs):
            for worker in workers:
                show(f"{workload.name}: {what}, turn {turn + 1}, {worker.peer}")
                row = {"workload": workload.name, "peer": worker.peer, "what": what, "step": turn}
                answer = worker.ask(do, **values)
                facts[worker.peer][f"{what} texts"] = answer.pop("texts", [])
                raw.append(row | answer)
    return raw, facts
