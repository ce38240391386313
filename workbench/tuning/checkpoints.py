"""A trainer's whole state in one folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from workbench.errors import TrainingError
from workbench.models.files import write_json, write_safetensors
from workbench.probes.numerics import not_finite
from workbench.runs.commits import commit_folder

FOLDER = "checkpoints"  # within a run's folder
WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME = (
    "trainable.safetensors",
    "optimizer.safetensors",
    "state.json",
)
VERSION = 1


def save_checkpoint(
    run_folder: Path,
    step: int,
    model: nn.Module,
    optimizer: optim.Optimizer,
    state: Mapping[str, object],
) -> Path:
    """Write `checkpoints/step-000123`: trainable tensors, the optimizer's state, and `state`.

    Args:
        run_folder: the run's folder.
        step: optimizer updates made.
        model: its trainable parameters are written.
        optimizer: its whole state is written.
        state: what else the run needs to go on; plain JSON values and dataclasses.

    Raises:
        TrainingError: a weight is not finite.
        RunError: the folder cannot be written; earlier checkpoints are intact.
    """
    weights = dict(tree_flatten(model.trainable_parameters()))
    bad = not_finite(weights)
    if bad:
        raise TrainingError(
            f"{bad[0]} is not finite at step {step}", cure="No checkpoint was written."
        )
    moments: dict[str, mx.array] = dict(tree_flatten(optimizer.state))
    plain = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in state.items()
    }

    def write(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS_NAME, weights)
        write_safetensors(folder / OPTIMIZER_NAME, moments)
        write_json(folder / STATE_NAME, {"version": VERSION, "step": step, **plain})

    return commit_folder(run_folder / FOLDER, f"step-{step:06d}", write)
