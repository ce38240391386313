"""A trainer's whole state in one folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from workbench.errors import FileFormatError, RunError, TrainingError, WeightsError
from workbench.models.files import read_json, read_safetensors
from workbench.numerics import not_finite
from workbench.runs.commits import commit_folder, discard_folder, recover_folders, verify_folder

FOLDER = "checkpoints"  # within a run's folder
PREFIX = "step-"
WEIGHTS_NAME = "trainable.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
VERSION = 1

Tensors = Mapping[str, mx.array]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    folder: Path
    weights: dict[str, mx.array]  # what trains, by name
    moments: dict[str, mx.array]  # the optimizer's state, by name
    state: dict[str, object]  # what else the run needs to go on

    @property
    def step(self) -> int:
        """Optimizer updates made."""
        return self.state["step"]


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
        state: what else the run needs to go on, as JSON.

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

    def write(folder: Path) -> None:
        for name, tensors in ((WEIGHTS_NAME, weights), (OPTIMIZER_NAME, moments)):
            contiguous = {key: mx.contiguous(tensor) for key, tensor in tensors.items()}
            with (folder / name).open("wb") as file:
                mx.save_safetensors(file, contiguous, {"format": "mlx"})
        text = json.dumps({**state, "version": VERSION, "step": step}, allow_nan=False)
        (folder / STATE_NAME).write_text(text, encoding="utf-8")

    target = checkpoint_folder(run_folder, step)
    return commit_folder(target.parent, target.name, write)


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where a step's checkpoint stands, or would stand."""
    return run_folder / FOLDER / f"{PREFIX}{step:06d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """A run's checkpoints, newest first, not verified."""
    folders = (run_folder / FOLDER).glob(f"{PREFIX}*")
    numbered = [path for path in folders if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def newest_checkpoint(run_folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones.

    What a killed process left unfinished is cleared away first.

    Raises:
        RunError: a checkpoint is of a version that this workbench does not read.
    """
    recover_folders(run_folder / FOLDER)
    problems = []
    for folder in list_checkpoints(run_folder):
        try:
            return read_checkpoint(folder), problems
        except FileFormatError as error:
            problems.append(str(error))
    return None, problems


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint whose every byte is as it was written.

    Raises:
        FileFormatError: it is damaged.
        RunError: it is of a version that this workbench does not read.
    """
    state = read_json(folder / STATE_NAME)
    if state.get("version") != VERSION:
        raise RunError(
            f"is of version {state.get('version')!r}, this workbench reads {VERSION}",
            where=folder,
            cure="Use the workbench that wrote it, or start a new run.",
        )
    verify_folder(folder)
    step = state.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise FileFormatError(f"has the step {step!r}", where=folder / STATE_NAME)
    weights = read_safetensors(folder / WEIGHTS_NAME)
    moments = read_safetensors(folder / OPTIMIZER_NAME)
    mx.eval(weights, moments)  # MLX reads late; the files may be gone then
    return Checkpoint(folder, weights, moments, state)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: optim.Optimizer) -> None:
    """Put a checkpoint's tensors into a model and an optimizer of the same shapes.

    Raises:
        WeightsError: names, shapes or types differ, or a weight is not finite; nothing is changed.
    """
    where = checkpoint.folder / OPTIMIZER_NAME
    _require_alike(checkpoint.moments, dict(tree_flatten(optimizer.state)), where)
    put_weights(checkpoint, model)
    optimizer.state = tree_unflatten(list(checkpoint.moments.items()))


def put_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put a checkpoint's trainable tensors into a model in which the same train.

    Raises:
        WeightsError: names, shapes or types differ, or a weight is not finite; nothing is changed.
    """
    where = checkpoint.folder / WEIGHTS_NAME
    _require_alike(checkpoint.weights, dict(tree_flatten(model.trainable_parameters())), where)
    bad = not_finite(checkpoint.weights)
    if bad:
        raise WeightsError(f"{bad[0]} is not finite", where=where)
    model.update(tree_unflatten(list(checkpoint.weights.items())))


def prune_checkpoints(run_folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and that of the best step."""
    for folder in list_checkpoints(run_folder)[keep:]:
        if int(folder.name.removeprefix(PREFIX)) != best_step:
            with contextlib.suppress(OSError):  # it may be removed the next time
                discard_folder(folder)


def _require_alike(given: Tensors, wanted: Tensors, where: Path) -> None:
    def form(tensors: Tensors, name: str) -> tuple | None:
        return (tensors[name].shape, tensors[name].dtype) if name in tensors else None

    names = sorted(given.keys() | wanted.keys())
    different = [name for name in names if form(given, name) != form(wanted, name)]
    if different:
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise WeightsError(
            f"{different[0]}{more} differs from what trains here",
            where=where,
            cure="Attach the same adapter to the same model as in the run.",
        )
