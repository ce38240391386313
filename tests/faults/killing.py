"""Trainings that die, or whose disk fails, at a chosen moment."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from tests.toy_training import computed, state_of, toy_trainer
from workbench.errors import RunError
from workbench.tuning import losses

SETTINGS = {"epochs": 5, "checkpoint_every": 2, "dropout": 0.2, "micro_batch_size": 4}
BOUNDARIES = (  # everything that changes the disk
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "truncate"),
    (tempfile, "mkdtemp"),
    (shutil, "rmtree"),
    (mx, "save_safetensors"),
    (Path, "open"),  # for appending
)
Action = Callable[[str], None]  # gets the change's name


@contextlib.contextmanager
def at_boundary(number: int, action: Action, lasting: bool = False) -> Iterator[list[str]]:
    """Do something before the n-th change of the disk, counted from 1; yields their names.

    With `lasting`, before every later one, too.
    """
    seen, originals = [], [(place, name, getattr(place, name)) for place, name in BOUNDARIES]

    def watched(name, original):
        def call(*args, **kwargs):
            if name == "open" and "a" not in args[1:]:
                return original(*args, **kwargs)
            seen.append(name)
            if len(seen) == number or (lasting and len(seen) > number):
                action(name)
            return original(*args, **kwargs)

        return call

    for place, name, original in originals:
        setattr(place, name, watched(name, original))
    try:
        yield seen
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def die(name: str = "") -> None:
    """SIGKILL, to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def summary(trainer) -> dict[str, object]:
    """What must be equal: reports, weights and optimizer state."""
    weights, moments = state_of(trainer)
    moments = {name: hashlib.sha256(value).hexdigest() for name, value in moments.items()}
    return {
        "reports": [repr(sorted(computed(report).items())) for report in trainer.reports],
        "weights": weights,
        "moments": moments,
    }


def train(run_dir: Path | None) -> dict[str, object]:
    """Train to the end, from whatever the folder holds."""
    trainer = toy_trainer(run_dir=run_dir, **SETTINGS)
    list(trainer)
    return summary(trainer)


def count_boundaries(run_dir: Path) -> list[str]:
    """Names of all changes of the disk in a training that nothing disturbs."""
    with at_boundary(0, die) as seen:
        train(run_dir)
    return seen


def killed_at(number: int, run_dir: Path) -> object:
    """A training that dies before the n-th change of the disk."""
    with at_boundary(number, die):
        return train(run_dir)


def killed_in_step(step: int, run_dir: Path) -> object:
    """A training that dies while it computes a loss."""
    trainer = toy_trainer(run_dir=run_dir, **SETTINGS)
    for report in trainer:
        if report.step == step:
            trainer.loss_fn = lambda model, batch: die() or losses.plain_loss(model, batch)


def failing(number: int, code: int, lasting: bool, run_dir: Path) -> dict[str, object]:
    """A training whose disk refuses the n-th change, or every one from then on; then it is mended.

    The same trainer goes on where there is one.
    """

    def refuse(name):
        if name != "rmtree":  # which is asked to ignore errors
            raise OSError(code, os.strerror(code))

    errors, trainer = [], None
    try:
        with at_boundary(number, refuse, lasting):
            trainer = toy_trainer(run_dir=run_dir, **SETTINGS)
            list(trainer)
    except RunError as error:
        errors.append(str(error))
    trainer = trainer or toy_trainer(run_dir=run_dir, **SETTINGS)
    list(trainer)
    return {"errors": errors, **summary(trainer)}
