"""A toy trainer slow enough to be watched; the notebooks of these tests import it."""

from __future__ import annotations

import time
from pathlib import Path

from tests.toy_training import RAGGED, toy_trainer
from workbench.tuning.losses import supervised_loss
from workbench.tuning.trainer import Trainer

STARTS = "starts.txt"  # in the run folder: the time at which each step began


def slow_trainer(run_dir: str, steps: int, seconds: float = 0.15, **settings: object) -> Trainer:
    """A trainer whose step takes `seconds`; it notes the clock when a step begins.

    The clock is the browser's, too: both run on one machine. So a click can be placed between
    two steps.
    """
    starts = Path(run_dir) / STARTS

    def loss_fn(model, batch):
        if model.training:  # not a validation
            with starts.open("a") as file:
                file.write(f"{time.time()}\n")
            time.sleep(seconds)
        return supervised_loss(model, batch)

    given = {"valid": RAGGED, "valid_every": 10, "schedule": "constant", **settings}
    return toy_trainer(steps=steps, run_dir=run_dir, loss_fn=loss_fn, **given)


def step_starts(run_dir: Path) -> list[float]:
    """When each step of a run began, in seconds since 1970."""
    path = run_dir / STARTS
    return [float(line) for line in path.read_text().splitlines()] if path.exists() else []
