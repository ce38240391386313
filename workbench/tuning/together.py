"""A trainer over several ranks: alike at the start, stopped after the same step, never apart."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx.utils import tree_flatten

from workbench.errors import ConfigError, RankError
from workbench.probes.parameters import digest
from workbench.tuning.config import StepReport
from workbench.tuning.identity import differences, environment, identity
from workbench.tuning.interrupts import DeferredInterrupt
from workbench.tuning.progress import Progress
from workbench.tuning.ranks import Ranks

if TYPE_CHECKING:
    from workbench.tuning.config import TrainConfig
    from workbench.tuning.trainer import Trainer

DIGEST_LETTERS = 16  # of a tensor's hash, that are compared


@contextlib.contextmanager
def starts_together(trainer: Trainer) -> Iterator[None]:
    """Around what opens a trainer's run folder, on rank 0: all start alike, or none does.

    Raises:
        ConfigError: so many ranks cannot share a step, or do what the settings say.
        RankError: the ranks differ, or another could not start.
    """
    if trainer.ranks.alone:
        yield
        return
    _check_settings(trainer.config, trainer.ranks)
    _require_alike(trainer)
    with trainer.ranks.together("opening the run folder"):
        yield
    _follow_first(trainer)


def _check_settings(config: TrainConfig, ranks: Ranks) -> None:
    rows, size = config.micro_batch_size * config.grad_accum_steps, ranks.size
    if rows % size:
        raise ConfigError(
            f"micro_batch_size {config.micro_batch_size} × grad_accum_steps "
            f"{config.grad_accum_steps} = {rows} rows a step are not divisible by {size} ranks",
            cure=f"Take a multiple of {size}, such as {-(-rows // size) * size} rows a step.",
        )
    if config.reload_every or config.reload_above_bytes:
        raise ConfigError(
            f"reload_every and reload_above_bytes are for one process, here are {size} ranks",
            cure="Set both to 0: only rank 0 has a run folder to read from.",
        )


def _require_alike(trainer: Trainer) -> None:
    """Raise RankError unless all ranks train the same model on the same data in the same way."""
    ranks = trainer.ranks
    objective = trainer.objective and trainer.objective.config
    own = {
        "identity": identity(trainer.base, trainer.data, trainer.config, objective, ranks.size),
        "environment": environment(),
        "files": (trainer.feed.state(trainer.steps_done) or {}).get("files"),
    }
    first, *others = ranks.gather("the comparison before the start", own)
    for rank, other in enumerate(others, 1):
        found = differences(first["identity"], other["identity"], than="rank 0's is")
        there = first["environment"]
        found += [
            f"{name} is {value}, rank 0's is {there.get(name)}"
            for name, value in other["environment"].items()
            if there.get(name) != value
        ]
        if first["files"] != other["files"]:
            found.append("the stream's files are others")
        if found:
            raise RankError(f"rank {rank} differs from rank 0: {'; '.join(found)}")


def _follow_first(trainer: Trainer) -> None:
    """Start from rank 0's state: its weights and optimizer state, to the bit, and its counters."""
    ranks = trainer.ranks
    own = {
        "has_run": trainer.has_run,
        "reports": [dataclasses.asdict(report) for report in trainer.reports],
        "progress": dataclasses.asdict(trainer.progress),
        "peak_learning_rate": trainer.peak_learning_rate,
        "position": trainer.feed.state(trainer.steps_done),
    }
    state = ranks.gather("the start", own if ranks.is_first else None)[0]
    with ranks.together("taking over rank 0's state"):
        if not ranks.is_first:
            trainer.has_run = state["has_run"]
            trainer.reports = [StepReport.from_row(row, "rank 0") for row in state["reports"]]
            trainer.progress = Progress(**state["progress"])
            trainer.peak_learning_rate = state["peak_learning_rate"]
            if trainer.reports:
                trainer.feed.restore(state["position"], trainer.steps_done, "rank 0's run")
    share_weights(trainer)
    trainer.optimizer.state = ranks.broadcast(trainer.optimizer.state)


def share_weights(trainer: Trainer) -> None:
    """Take rank 0's trainable weights."""
    if not trainer.ranks.alone:
        trainer.model.update(trainer.ranks.broadcast(trainer.model.trainable_parameters()))


def require_equal_weights(trainer: Trainer) -> None:
    """Raise RankError if what trains is no longer the same on all ranks, to the bit."""
    ranks = trainer.ranks
    if ranks.alone:
        return
    own = {
        name: digest(array)[:DIGEST_LETTERS]
        for name, array in tree_flatten(trainer.model.trainable_parameters())
    }
    first, *others = ranks.gather("the comparison of weights", own)
    for rank, other in enumerate(others, 1):
        apart = sorted(name for name in first if other.get(name) != first[name])
        if apart:
            trainer.drifted = True
            raise RankError(
                f"the weights of rank {rank} are no longer those of rank 0 at step "
                f"{trainer.steps_done} ({len(apart)} of {len(first)} tensors, first {apart[0]})",
                cure="No checkpoint was written. Are the machines alike? Start again: the run "
                "goes on from its newest checkpoint.",
            )


def begin_step(trainer: Trainer) -> None:
    """Make sure that all ranks are at the same step, with rank 0's learning rate."""
    ranks = trainer.ranks
    if ranks.alone:
        return
    point = f"the beginning of step {trainer.steps_done + 1}"
    rate = ranks.gather(point, trainer.peak_learning_rate)[0]
    if rate != trainer.peak_learning_rate:
        trainer.peak_learning_rate = rate


@contextlib.contextmanager
def ends_together(trainer: Trainer, interrupt: DeferredInterrupt) -> Iterator[None]:
    """Around the end of a step: whoever is to stop, or fails, stops all ranks after that step."""
    ranks = trainer.ranks
    if ranks.alone:
        yield
        return
    point = f"the end of step {trainer.steps_done + 1}"
    try:
        yield
    except BaseException as error:
        ranks.tell(point, f"failed: {error}")
        raise
    wish = "interrupted" if interrupt.requested else trainer.stop_wish
    said = ranks.gather(point, wish)
    reasons = [f"rank {rank}: {what}" if rank else what for rank, what in enumerate(said) if what]
    if reasons:
        trainer.stop_reason, trainer.stop_wish = reasons[0], ""
