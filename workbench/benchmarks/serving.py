"""Peers that load and generate, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from workbench.benchmarks.workers import Worker
from workbench.benchmarks.workloads import Workload
from workbench.errors import BenchmarkError

LOADS = 4  # for each generation
WARM_TOKENS = 4  # that are generated before anything is counted
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

    A first load of each process, and a few tokens, are not counted: they import what is needed and
    warm the disk.

    Returns:
        A row for each turn of each peer (what, seconds, tokens), and facts by peer.

    Raises:
        BenchmarkError: a peer failed, or generated more or fewer tokens than were asked for.
    """
    facts, raw = _warm(workers, model), []
    wanted = {"do": "generate", "max_tokens": workload.length}
    asked = (
        ("load", LOADS, {"do": "load", "model": str(model)}),
        ("generate 1", 1, {"prompts": PROMPTS[:1], **wanted}),
        ("generate 8", 1, {"prompts": PROMPTS, **wanted}),
    )
    for what, times, message in asked:
        for turn in range(1, 1 + times * workload.epochs):
            for worker in workers:
                show(f"{workload.name}: {what}, turn {turn}, {worker.peer}")
                row = {"workload": workload.name, "peer": worker.peer, "what": what, "step": turn}
                row |= worker.ask(**message)
                if "texts" in row:
                    facts[worker.peer][f"{what} texts"] = row.pop("texts")
                    require_all_tokens(row, len(message["prompts"]), workload.length)
                raw.append(row)
    return raw, facts


def _warm(workers: Sequence[Worker], model: Path) -> dict[str, dict]:
    for worker in workers:
        worker.send("load", model=str(model))
    for worker in workers:
        worker.receive()
        worker.ask("generate", prompts=PROMPTS[:1], max_tokens=WARM_TOKENS)
    return {worker.peer: worker.ask("describe") for worker in workers}


def require_all_tokens(row: Mapping[str, object], prompts: int, tokens: int) -> None:
    """Refuse an answer that ended early: fewer tokens were made in the time.

    Raises:
        BenchmarkError: names the peer and both numbers.
    """
    if row["tokens"] != tokens * prompts:
        raise BenchmarkError(
            f"generated {row['tokens']} tokens instead of {prompts} × {tokens}",
            where=row["peer"],
            cure="Take another model: an answer of this one ends early.",
        )
