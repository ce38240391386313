"""The step and the loop. Training yields; callers observe."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from workbench.backend import default_cache_limit
from workbench.data.batches import Batch, BatchPlan, collate
from workbench.data.datasets import Dataset
from workbench.errors import MemoryWarning, RunError, TrainingError, check_number
from workbench.models.loading import BaseModel
from workbench.probes.guard import FINE, OVER, MemoryGuard
from workbench.probes.memory import read_memory, release_memory, reset_peak
from workbench.probes.numerics import not_finite
from workbench.runs.store import RunFolder, as_config
from workbench.tuning.checkpoints import save_checkpoint
from workbench.tuning.config import StepReport, TrainConfig
from workbench.tuning.gradients import clip_by_global_norm
from workbench.tuning.interrupts import DeferredInterrupt
from workbench.tuning.losses import LossFunction, default_loss, mean_loss
from workbench.tuning.refusals import check_rows, require_finite
from workbench.tuning.schedules import learning_rate_at


class Trainer:
    """Trains whatever is not frozen in a model.

    Iterate over it: each item is a `StepReport` of an update that has been made. Leaving the loop
    and coming back goes on with the next step. `reports`, the metrics on disk and the weights
    always agree: an interrupt waits for the step to finish.

    Args:
        base: a loaded model, with its adapter attached.
        data: a `Dataset`; its `valid` part is used for validation.
        config: how to train.
        run_dir: a new folder for the configuration and the metrics; None writes nothing.
        loss_fn: (model, batch) → sum of the loss over the batch's supervised targets.

    Raises:
        TrainingError: nothing is trainable.
        DataError: no rows, or token ids that the embedding does not have.
        RunError: the run folder is used already, or not writable.
    """

    def __init__(
        self,
        base: BaseModel,
        data: Dataset,
        config: TrainConfig | None = None,
        run_dir: str | os.PathLike | None = None,
        loss_fn: LossFunction | None = None,
    ):
        self.base, self.data, self.config = base, data, config or TrainConfig()
        self.model = base.model
        if not tree_flatten(self.model.trainable_parameters()):
            raise TrainingError("nothing is trainable", cure="Attach an adapter: wb.add_lora(…).")
        check_rows(data, base)
        self.plan = BatchPlan(
            tuple(map(len, data.train)),
            self.config.micro_batch_size,
            self.config.grad_accum_steps,
            self.config.seed,
        )
        self.total_steps = self.config.steps or self.config.epochs * self.plan.steps_per_epoch
        self.optimizer = optim.AdamW(
            learning_rate=0.0,  # set anew at every step
            betas=list(self.config.adam_betas),
            eps=self.config.adam_epsilon,
            weight_decay=self.config.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.model.trainable_parameters())
        self.loss_fn = loss_fn or default_loss(self.model)
        self.reports: list[StepReport] = []
        self.guard = MemoryGuard(self.config.memory_limit_bytes)
        self.stop_reason = ""  # why the loop ended early
        self._peak_rate = self.config.learning_rate
        self._peak_started = self._warned = False
        self._lean = False  # whether the step began with an empty cache
        config_on_disk = as_config(train=self.config, model=base.name, data=data.name)
        self.run = RunFolder(run_dir, config_on_disk) if run_dir is not None else None

    @property
    def steps_done(self) -> int:
        """Optimizer updates made so far."""
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

    def stop(self, reason: str = "stopped by request") -> None:
        """End the loop after the step that is being made. Sets a flag only: any thread may call."""
        self.stop_reason = reason

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """For a loop that calls `step` itself: sets MLX's limits, and brings the old ones back.

        Such a loop goes on while not `finished` and not `stop_reason`.
        """
        self.stop_reason = ""
        with cache_limit(self.config.cache_limit_bytes):
            yield

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
        with DeferredInterrupt() as interrupt:
            report = self._update()
            try:
                if self._validates_after(report.step):
                    report = dataclasses.replace(report, valid_loss=self.validate(interrupt))
            finally:  # the update has been made, whatever became of the validation
                self.reports.append(report)
                if self.run is not None:
                    self.run.append(dataclasses.asdict(report))
            self._watch_memory(report)
        return report

    def save_checkpoint(self) -> Path:
        """Write weights, optimizer state and place in the data to `checkpoints/` of the run folder.

        Raises:
            RunError: the trainer has no run folder, or it cannot be written.
        """
        if self.run is None:
            raise RunError("a checkpoint needs a run folder", cure="Give Trainer a run_dir.")
        state = {"train": self.config, "peak_learning_rate": self._peak_rate}
        folder = self.run.folder
        return save_checkpoint(folder, self.steps_done, self.model, self.optimizer, state)

    def _watch_memory(self, report: StepReport) -> None:
        """Release memory when it gets tight; checkpoint and stop before the machine swaps."""
        verdict, lean = self.guard.verdict(report), self._lean
        self._lean = verdict != FINE
        if not self._lean:
            return
        release_memory()
        if verdict == OVER and (lean or self.guard.verdict(read_memory()) == OVER):
            saved = f"; checkpoint in {self.save_checkpoint()}" if self.run is not None else ""
            self.stop(f"memory: {self.guard.explain(report)}")
            text = f"stopped: {self.guard.explain(report)}{saved}"
            warnings.warn(text, MemoryWarning, stacklevel=3)
        elif not self._warned:
            self._warned = True
            text = f"{self.guard.explain(report)}; MLX's cache is emptied after each step"
            warnings.warn(text, MemoryWarning, stacklevel=3)

    def validate(self, interrupt: DeferredInterrupt | None = None) -> float | None:
        """Mean cross-entropy over the validation targets; None if interrupted on the way."""
        return mean_loss(
            self.model,
            self.data.valid,
            self.config.micro_batch_size,
            self.loss_fn,
            stop=lambda: interrupt is not None and interrupt.requested,
        )

    def _validates_after(self, step: int) -> bool:
        every = self.config.valid_every
        due = step == self.total_steps or (every and step % every == 0)
        return bool(self.data.valid) and due

    def _update(self) -> StepReport:
        started, step = time.perf_counter(), self.steps_done
        batches = [collate(self.data.train, rows) for rows in self.plan.micro_batches(step)]
        num_tokens = sum(batch.num_tokens for batch in batches)
        loss_sum, gradients = self._accumulate(batches, step)
        loss = loss_sum / num_tokens
        gradients = tree_map(lambda g: g / num_tokens, gradients)
        clipped, norm = clip_by_global_norm(gradients, self.config.max_grad_norm)
        places = [self.data.train[row].where for batch in batches for row in batch.rows]
        require_finite(loss, norm, gradients, step + 1, places)
        rate = self.learning_rate(step)
        self._apply(clipped, loss, rate, step + 1)
        seconds, clip_at = time.perf_counter() - started, self.config.max_grad_norm
        num_input_tokens = sum(batch.tokens[:, 1:].size for batch in batches)
        return StepReport(
            step=step + 1,
            total_steps=self.total_steps,
            epoch=step // self.plan.steps_per_epoch + 1,
            loss=loss.item(),
            num_tokens=num_tokens,
            num_input_tokens=num_input_tokens,
            learning_rate=rate,
            grad_norm=norm.item(),
            clipped_grad_norm=min(norm.item(), clip_at) if clip_at else norm.item(),
            step_seconds=seconds,
            tokens_per_second=num_input_tokens / seconds,
            **dataclasses.asdict(read_memory()),
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate_at(
            step,
            schedule=self.config.schedule,
            peak=self._peak_rate,
            floor=min(self.config.min_learning_rate, self._peak_rate),
            warmup_steps=self.config.warmup_steps,
            total_steps=self.total_steps,
        )

    def _accumulate(self, batches: Sequence[Batch], step: int) -> tuple[mx.array, dict]:
        """Sums of loss and gradients over micro-batches; each is evaluated before the next."""
        mx.random.seed(_step_seed(self.config.seed, step))  # dropout: from (seed, step) alone
        self.model.train()
        loss_and_grad = nn.value_and_grad(self.model, self.loss_fn)
        total, gradients = mx.array(0.0), None
        try:
            for batch in batches:
                loss, new = loss_and_grad(self.model, batch)
                gradients = new if gradients is None else tree_map(mx.add, gradients, new)
                total = total + loss
                mx.eval(total, gradients)
        finally:
            self.model.eval()
        return total, gradients

    def _apply(self, gradients: dict, loss: mx.array, rate: float, step: int) -> None:
        """Update the parameters, or leave everything as it was and raise."""
        before = self.model.trainable_parameters(), tree_map(lambda x: x, self.optimizer.state)
        try:
            self.optimizer.learning_rate = rate
            self.optimizer.update(self.model, gradients)
            mx.eval(self.model.trainable_parameters(), self.optimizer.state, loss)
            bad = not_finite(self.model.trainable_parameters())
            if bad:
                raise TrainingError(f"the optimizer made {bad[0]} not finite")
        except Exception as error:
            self.model.update(before[0])
            self.optimizer.state = before[1]
            raise TrainingError(
                f"the optimizer failed at step {step} ({error})",
                cure="The weights are those before the step.",
            ) from error


@contextlib.contextmanager
def cache_limit(limit: int | None) -> Iterator[None]:
    """Bound what MLX's allocator keeps for reuse; the old bound comes back afterwards."""
    previous = mx.set_cache_limit(default_cache_limit() if limit is None else limit)
    try:
        yield
    finally:
        mx.set_cache_limit(previous)


def _step_seed(seed: int, step: int) -> int:
    return ((seed & 0xFFFFFFFF) << 32) | (step & 0xFFFFFFFF)
