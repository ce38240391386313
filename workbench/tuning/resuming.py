"""A run that goes on: what a checkpoint holds of a trainer, and how it comes back."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import FileFormatError, ResumeWarning, RunError
from workbench.runs.store import METRICS_NAME, RunFolder, read_rows
from workbench.tuning.checkpoints import (
    Checkpoint,
    checkpoint_folder,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    put_weights,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from workbench.tuning.config import StepReport
from workbench.tuning.identity import differences, environment, identity
from workbench.tuning.progress import Progress
from workbench.tuning.reloading import reload_frozen

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer


class RunKeeper:
    """Saves a trainer's state into its run folder, and puts it back.

    Args:
        run: the folder.
        allow_changes: go on although settings, data or base model are others.
    """

    def __init__(self, run: RunFolder, allow_changes: bool):
        self.run, self.allow_changes = run, allow_changes
        self.changes: list[dict[str, object]] = []  # that were allowed, and at which step
        self._rows = 0  # steps whose metrics are on the disk
        self._identity: dict[str, object] | None = None
        self._saved: tuple[int, float] | None = None  # step and peak rate of the newest checkpoint

    def write_rows(self, trainer: Trainer) -> None:
        """Write the metrics of steps that are not on the disk yet; after a fault, more than one.

        Raises:
            RunError: a row cannot be written; the next call begins with it.
        """
        for report in trainer.reports[self._rows :]:
            self.run.append(dataclasses.asdict(report))
            self._rows += 1

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint of the trainer as it is; older ones are removed.

        Raises:
            RunError: it cannot be written; older ones are intact.
        """
        state = {
            "identity": self._identity_of(trainer),
            "environment": environment(),
            "peak_learning_rate": trainer.peak_learning_rate,
            "progress": dataclasses.asdict(trainer.progress),
            "changes": self.changes,
            "position": trainer.feed.state(trainer.steps_done),
        }
        self.write_rows(trainer)
        self.run.sync()  # the rows up to here must outlive the checkpoint that counts on them
        folder, step = self.run.folder, trainer.steps_done
        saved = save_checkpoint(folder, step, trainer.model, trainer.optimizer, state)
        prune_checkpoints(folder, trainer.config.keep_checkpoints, trainer.progress.best_step)
        self._saved = step, trainer.peak_learning_rate
        return saved

    def save_if_new(self, trainer: Trainer) -> None:
        """Write a checkpoint unless the newest one is of this step already."""
        if self._saved != (trainer.steps_done, trainer.peak_learning_rate):
            self.save(trainer)

    def resume(self, trainer: Trainer) -> Path | None:
        """Go on from the newest whole checkpoint; returns it, or None for a run without steps.

        Raises:
            RunError: the run is another, or nothing of it can be read.
        """
        if not self.run.goes_on:
            return None
        checkpoint, problems = newest_checkpoint(self.run.folder)
        for problem in problems:
            warnings.warn(
                f"damaged, so an older one is used: {problem}", ResumeWarning, stacklevel=5
            )
        if checkpoint is None:
            self._require_no_steps(problems)
            self.run.cut(0)
            return None
        self._require_same(trainer, checkpoint)
        reports = self._reports(checkpoint)
        progress, rate = _read_state(checkpoint)
        place = checkpoint.state.get("position")
        trainer.feed.restore(place, checkpoint.step, checkpoint.folder)
        restore(checkpoint, trainer.model, trainer.optimizer)
        self.run.cut(checkpoint.step)
        trainer.reports, trainer.progress = reports, progress
        if _had_rate(checkpoint, trainer.config.learning_rate):
            trainer.peak_learning_rate = rate  # which may have been set by hand
        self._rows = checkpoint.step
        self._saved = checkpoint.step, rate
        return checkpoint.folder

    def load_weights(self, trainer: Trainer, step: int) -> None:
        """Put the trainable tensors of a step's checkpoint into the model, and nothing else."""
        checkpoint = read_checkpoint(checkpoint_folder(self.run.folder, step))
        put_weights(checkpoint, trainer.model)

    def reload(self, trainer: Trainer) -> None:
        """Save, drop every tensor of model and optimizer, and read them from the disk again.

        Raises:
            TrainingError: the base model's files are not what was loaded.
        """
        self.save_if_new(trainer)
        newest = list_checkpoints(self.run.folder)[0]
        reload_frozen(trainer.base, trainer.optimizer)
        restore(read_checkpoint(newest), trainer.model, trainer.optimizer)

    def _identity_of(self, trainer: Trainer) -> dict[str, object]:
        if self._identity is None:  # hashed once
            objective = trainer.objective and trainer.objective.config
            self._identity = identity(
                trainer.base, trainer.data, trainer.config, objective, trainer.ranks.size
            )
        return self._identity

    def _require_no_steps(self, problems: list[str]) -> None:
        path = self.run.folder / METRICS_NAME
        rows = read_rows(self.run.folder, METRICS_NAME) if path.exists() else []
        if rows or problems:
            raise RunError(
                f"holds {len(rows)} steps of a run, but no checkpoint that can be read",
                where=self.run.folder,
                cure="Give a new run its own folder: wb.new_run('runs', 'name') makes one.",
            )

    def _require_same(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        before, there = checkpoint.state.get("identity"), checkpoint.state.get("environment")
        changes = checkpoint.state.get("changes")
        if not (isinstance(before, Mapping) and isinstance(there, Mapping)) or (
            not isinstance(changes, list)
        ):
            raise RunError("is not a checkpoint of a trainer", where=checkpoint.folder)
        found = differences(before, self._identity_of(trainer))
        if found and not self.allow_changes:
            raise RunError(
                f"holds a run that is not this one: {'; '.join(found)}",
                where=self.run.folder,
                cure="Use another run_dir; or, to go on all the same, allow_changes=True.",
            )
        self.changes = (
            [*changes, {"step": checkpoint.step, "differences": found}] if found else changes
        )
        here = environment()
        moved = [f"{k} was {there.get(k)}, is {v}" for k, v in here.items() if there.get(k) != v]
        if moved:
            warnings.warn(f"not bit for bit: {'; '.join(moved)}", ResumeWarning, stacklevel=6)

    def _reports(self, checkpoint: Checkpoint) -> list[StepReport]:
        rows = read_rows(self.run.folder, METRICS_NAME) if checkpoint.step else []
        where = self.run.folder / METRICS_NAME
        reports = [StepReport.from_row(row, where) for row in rows[: checkpoint.step]]
        if [report.step for report in reports] != list(range(1, checkpoint.step + 1)):
            raise RunError(
                f"lacks rows of the {checkpoint.step} steps that its checkpoint has made",
                where=where,
                cure="Put the file back as it was, or start a new run in another folder.",
            )
        return reports


def _had_rate(checkpoint: Checkpoint, rate: float) -> bool:
    """Whether a checkpoint's run was configured with this largest learning rate."""
    settings = checkpoint.state["identity"].get("settings")
    return isinstance(settings, Mapping) and settings.get("learning_rate") == rate


def _read_state(checkpoint: Checkpoint) -> tuple[Progress, float]:
    """The counters and the peak learning rate of a checkpoint."""
    progress, rate = checkpoint.state.get("progress"), checkpoint.state.get("peak_learning_rate")
    names = {field.name for field in dataclasses.fields(Progress)}
    numbers = [rate, *(progress.values() if isinstance(progress, Mapping) else [None])]
    sound = isinstance(progress, Mapping) and set(progress) == names
    sound = sound and all(
        number is None or (type(number) in (int, float) and math.isfinite(number))
        for number in numbers
    )
    if not sound or rate is None or rate < 0:
        raise FileFormatError("does not hold a trainer's counters", where=checkpoint.folder)
    return Progress(**progress), rate
