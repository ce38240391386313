"""The step and the loop. Training yields; callers observe."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx.utils import tree_flatten

from workbench.backend import default_cache_limit
from workbench.data.datasets import Dataset
from workbench.errors import ConfigError, RunError, TrainingError, check_number
from workbench.machine import LARGE_BLOCK_BYTES
from workbench.models.loading import BaseModel
from workbench.probes.guard import MemoryGuard
from workbench.probes.memory import cache_limit, reset_peak
from workbench.runs.store import RunFolder
from workbench.tuning.config import StepReport, TrainConfig
from workbench.tuning.feeding import make_feed
from workbench.tuning.identity import run_config
from workbench.tuning.interrupts import DeferredInterrupt, orderly_exit
from workbench.tuning.losses import LossFunction, chosen_loss, mean_loss
from workbench.tuning.memory_watch import MemoryWatch
from workbench.tuning.objectives import ObjectiveConfig, use_objective
from workbench.tuning.observers import Observer, Observers
from workbench.tuning.optimizers import make_optimizer
from workbench.tuning.prefix import use_prefix
from workbench.tuning.progress import Progress
from workbench.tuning.prompt_sharing import share_prompts
from workbench.tuning.ranks import ALONE, Ranks
from workbench.tuning.refusals import require_kinds
from workbench.tuning.reporting import with_validation
from workbench.tuning.resuming import RunKeeper
from workbench.tuning.schedules import learning_rate_at
from workbench.tuning.together import (
    begin_step,
    ends_together,
    require_equal_weights,
    share_weights,
    starts_together,
)
from workbench.tuning.update import make_update


class Trainer:
    """Trains whatever is not frozen in a model.

    Iterate over it: each item is a `StepReport` of an update that has been made. Leaving the loop
    and coming back goes on with the next step. `reports`, the metrics on disk and the weights
    always agree: an interrupt waits for the step to finish.

    With the folder of a run that was stopped or killed, the trainer goes on from its newest whole
    checkpoint, bit for bit as if it had not been stopped.

    Args:
        base: a loaded model, with its adapter attached.
        data: a `Dataset`, or a stream; its `valid` part is used for validation.
        config: how to train.
        run_dir: a folder for configuration, metrics and checkpoints, new or of the run that shall
            go on; None writes nothing.
        loss_fn: (model, batch) → sum of the loss over the batch's supervised targets.
        allow_changes: go on with other settings, data or base model; the run's records say so.
        objective: what is trained instead, on data made for it: `DPOConfig`, `ProvenanceConfig`.
        observers: functions of a StepReport, or callbacks of mlx-lm, told of every step.
        ranks: `wb.join_ranks()`, to share each step's rows with other processes. The steps are
            those of one process. Every rank makes the same trainer and the same steps; rank 0
            alone has the run folder and tells the observers, and its weights are the start.

    Raises:
        ConfigError: a wrong kind of argument, or ranks that cannot share a step's rows alike.
        RankError: the ranks' models, data, settings or versions differ.
        TrainingError: nothing is trainable.
        DataError: no rows, or token ids that the embedding does not have.
        RunError: the folder's run is another, or its files cannot be used.
    """

    def __init__(
        self,
        base: BaseModel,
        data: Dataset,
        config: TrainConfig | None = None,
        run_dir: str | os.PathLike | None = None,
        loss_fn: LossFunction | None = None,
        allow_changes: bool = False,
        objective: ObjectiveConfig | None = None,
        observers: Iterable[Observer] | Observer = (),
        ranks: Ranks = ALONE,
    ):
        self.base, self.data, self.config = require_kinds(base, data, config or TrainConfig())
        self.model, self.ranks = base.model, ranks
        self.stop_reason = self.stop_wish = ""  # why the loop ended early; why this rank wants it
        if not tree_flatten(self.model.trainable_parameters()):
            raise TrainingError("nothing is trainable", cure="Attach an adapter: wb.add_lora(…).")
        if run_dir is None and (self.config.reload_every or self.config.reload_above_bytes):
            raise ConfigError("a reload needs a run folder", cure="Give Trainer a run_dir.")
        self.feed = make_feed(data, base, self.config)  # the micro-batches of each step
        self.plan = self.feed.plan  # None of a stream
        self.total_steps = self.config.steps or self.config.epochs * self.plan.steps_per_epoch
        self.optimizer = make_optimizer(self.config)
        self.optimizer.init(self.model.trainable_parameters())
        self.loss_fn = chosen_loss(self.model, loss_fn, self.config.fused_loss)
        self.objective = use_objective(self, objective, loss_fn is not None)
        self.guard, self._memory = MemoryGuard(self.config.memory_limit_bytes), MemoryWatch()
        self.reports: list[StepReport] = []
        self.observers = Observers(observers, self.config.grad_accum_steps)
        self.progress, self._interrupt = Progress(), DeferredInterrupt()
        self.prompt_sharing = share_prompts(self, loss_fn is not None)  # if there is any, and why
        self.prefix = use_prefix(self, loss_fn is not None)  # whether it is kept, and why
        self._peak_rate, self._peak_started = self.config.learning_rate, False
        self.run: RunFolder | None = None
        self.has_run, self.drifted = run_dir is not None, False  # on rank 0; apart from the others
        with starts_together(self):
            if run_dir is not None and ranks.is_first:
                self.run = RunFolder(run_dir, run_config(self))
                self._keeper = RunKeeper(self.run, allow_changes)
                self._keeper.resume(self)

    @property
    def steps_done(self) -> int:
        """Optimizer updates made so far, those of skipped batches included."""
        return len(self.reports)

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.steps_done >= self.total_steps

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate; when set, the schedule goes on with it from the next step."""
        return self._peak_rate

    @peak_learning_rate.setter
    def peak_learning_rate(self, rate: float) -> None:
        check_number("peak_learning_rate", rate, 0)
        self._peak_rate = float(rate)

    @property
    def is_stopping(self) -> bool:
        """Whether the next step is the last: a stop or Ctrl-C came, which other ranks must hear."""
        return bool(self.stop_wish) or self._interrupt.requested

    @property
    def cache_limit_bytes(self) -> int:
        """What MLX may keep for reuse while this trains."""
        if self.config.cache_limit_bytes is not None:
            return self.config.cache_limit_bytes
        arrays = [array for _, array in tree_flatten(self.model.trainable_parameters())]
        return default_cache_limit(sum(a.nbytes for a in arrays if a.nbytes >= LARGE_BLOCK_BYTES))

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate_at(
            step,
            schedule=self.config.schedule,
            peak=self._peak_rate,
            floor=min(self.config.min_learning_rate, self._peak_rate),
            warmup_steps=self.config.warmup_steps,
            total_steps=self.total_steps,
            power=self.config.decay_power,
            decay_steps=self.config.decay_steps,
            warmup_from=self.config.warmup_from,
        )

    def stop(self, reason: str = "stopped by request") -> None:
        """End the loop after the step that is being made. Sets a flag only: any thread may call.

        With other ranks, all end after the same step: that, or the next one.
        """
        if self.ranks.alone:
            self.stop_reason = reason
        else:
            self.stop_wish = reason

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """For a loop that calls `step` itself: sets MLX's limits, and brings the old ones back.

        Such a loop goes on while not `finished` and not `stop_reason`. When it ends early, for
        whatever reason, the run folder gets a checkpoint.
        """
        self.stop_reason = self.stop_wish = ""
        held = contextlib.nullcontext() if self.ranks.alone else self._interrupt
        try:  # Ctrl-C waits until a step has told it: all ranks end after the same
            with orderly_exit(), cache_limit(self.cache_limit_bytes), held:
                yield
        finally:
            mine = self.run is not None and self.run.is_mine
            if mine and self.reports and not self.drifted:
                self._keeper.save_if_new(self)

    def __iter__(self) -> Iterator[StepReport]:
        with self.session():
            while not self.finished and not self.stop_reason:
                yield self.step()

    def step(self) -> StepReport:
        """Make one optimizer update; returns its report.

        Raises:
            TrainingError: loss or gradients are not finite, the optimizer failed, or all steps
                have been made. Weights, optimizer state and step count are those before the step.
        """
        if self.finished:
            raise TrainingError(f"all {self.total_steps} steps have been made")
        if not self._peak_started:
            reset_peak()
            self._peak_started = True
        if self.run is not None and not self.reports:
            self._keeper.save_if_new(self)
        with self._interrupt as interrupt:
            begin_step(self)
            released = self._memory.reload_if_due(self)
            report = dataclasses.replace(make_update(self), released_bytes=released)
            with ends_together(self, interrupt):
                try:
                    if self._validates_after(report.step):
                        report = with_validation(self, report, interrupt)
                finally:  # the update has been made, whatever became of the validation
                    self._record(report)
                if self.run is not None and interrupt.requested:
                    self._keeper.save_if_new(self)
        return report

    def validate(self) -> float | None:
        """Mean loss over the validation targets, or pairs; None if there are none.

        Each rank that asks computes all of it.
        """
        return mean_loss(self.model, self.data.valid, self.config.micro_batch_size, self.loss_fn)

    def save_checkpoint(self) -> Path | None:
        """Write weights, optimizer state and all else to `checkpoints/` of the run folder.

        Returns its place; None on ranks other than 0, which write nothing.

        Raises:
            RunError: the trainer has no run folder, or it cannot be written.
        """
        if not self.has_run:
            raise RunError("a checkpoint needs a run folder", cure="Give Trainer a run_dir.")
        return self._keeper.save(self) if self.run is not None else None

    def load_best(self) -> int:
        """Put back the weights of the best validation; returns its step. Training can go on.

        Raises:
            RunError: there was no validation, or no run folder that kept the weights.
        """
        best = self.progress.best_step
        if not self.has_run or best is None:
            raise RunError(
                "no validation has kept its weights",
                cure="Train with a run_dir, validation rows and valid_every.",
            )
        with self.ranks.together("loading the best weights"):
            if self.run is not None:
                self._keeper.load_weights(self, best)
        share_weights(self)
        return best

    def reload(self) -> None:
        """Checkpoint, drop every tensor of model and optimizer, read them again, and go on.

        Gives memory back that has crept up; losses and weights stay the same to the bit.

        Raises:
            RunError: the trainer has no run folder, or it cannot be written.
            TrainingError: the base model's files are gone, or are not what was loaded.
        """
        if self.run is None:
            raise RunError("a reload needs a run folder", cure="Give Trainer a run_dir.")
        self._keeper.reload(self)

    def _record(self, report: StepReport) -> None:
        """Take in a step that was made: reports, metrics on disk, checkpoint, reasons to stop."""
        self.reports.append(report)
        if self.run is not None:
            self._keeper.write_rows(self)
        is_best = report.valid_loss is not None and self.progress.note_validation(
            report.step, report.valid_loss
        )
        every = self.config.checkpoint_every
        if is_best or self.finished or (every and report.step % every == 0):
            require_equal_weights(self)
            if self.run is not None:
                self._keeper.save(self)
        if self.config.patience and self.progress.without_improvement >= self.config.patience:
            self.stop(f"no better validation in {self.config.patience}")
        self._memory.judge(self, report)
        if self.ranks.is_first:
            self.observers.tell(self.reports)

    def _validates_after(self, step: int) -> bool:
        every = self.config.valid_every
        due = step == self.total_steps or (every and step % every == 0)
        return bool(self.data.valid) and due
