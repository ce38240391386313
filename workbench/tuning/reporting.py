"""The report of an update, from what it computed and what the machine holds."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from workbench.data.batches import Batch
from workbench.probes.memory import read_memory
from workbench.tuning.config import StepReport
from workbench.tuning.interrupts import DeferredInterrupt
from workbench.tuning.losses import mean_measures
from workbench.tuning.progress import SPIKE_WINDOW, is_spike

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer


def make_report(
    trainer: Trainer,
    batches: Sequence[Batch],
    loss: float,
    norm: float,
    started: float,
    extras: Mapping[str, mx.array],
    skipped: bool = False,
) -> StepReport:
    """The report of the trainer's step that was just made.

    Args:
        trainer: which has not yet counted the step.
        batches: the step's micro-batches.
        loss: mean over the supervised targets or the pairs, in nats.
        norm: of the gradients, before clipping.
        started: when, by time.perf_counter.
        extras: means of what the loss function measures beside the loss, by name.
        skipped: whether no update was made.
    """
    seconds, step = time.perf_counter() - started, trainer.steps_done
    num_input_tokens = sum(batch.tokens[:, 1:].size for batch in batches)
    return StepReport(
        step=step + 1,
        total_steps=trainer.total_steps,
        epoch=trainer.feed.epoch(step),
        epoch_share=trainer.feed.progress,
        loss=loss,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_input_tokens=num_input_tokens,
        learning_rate=trainer.learning_rate(step),
        grad_norm=norm,
        clipped_grad_norm=min(norm, trainer.config.max_grad_norm or math.inf),
        step_seconds=seconds,
        tokens_per_second=num_input_tokens / seconds,
        skipped=skipped,
        spike=is_spike(loss, [report.loss for report in trainer.reports[-SPIKE_WINDOW:]]),
        extras={name: mean.item() for name, mean in extras.items()} or None,
        **dataclasses.asdict(read_memory()),
    )


def with_validation(
    trainer: Trainer, report: StepReport, interrupt: DeferredInterrupt
) -> StepReport:
    """The report with the means over the validation rows, and how long they took.

    As it was, if interrupted on the way.
    """
    started = time.perf_counter()
    loss, measures = mean_measures(
        trainer.model,
        trainer.data.valid,
        trainer.config.micro_batch_size,
        trainer.loss_fn,
        stop=lambda: interrupt.requested,
        ranks=trainer.ranks,
    )
    named = {f"valid_{name}": value for name, value in measures.items()}
    extras = {**(report.extras or {}), **named} or None
    seconds = None if loss is None else time.perf_counter() - started
    return dataclasses.replace(report, valid_loss=loss, valid_seconds=seconds, extras=extras)
