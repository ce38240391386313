"""One optimizer update: gradients over the micro-batches, then all of it or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from workbench.data.batches import Batch
from workbench.errors import TrainingError
from workbench.models.checkpointing import checkpointed_layers
from workbench.numerics import not_finite
from workbench.tuning.losses import LossFunction


def accumulate(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Sequence[Batch],
    seed: int,
    grad_checkpoint: bool = False,
) -> tuple[mx.array, dict]:
    """Sums of loss and gradients over micro-batches; each is evaluated before the next.

    Args:
        model: in training mode for the length of the call.
        loss_fn: (model, batch) → sum of the loss over the batch's supervised targets.
        batches: the micro-batches of one step.
        seed: of dropout.
        grad_checkpoint: keep each layer's input only, and compute the layer again.
    """
    layers = checkpointed_layers(model) if grad_checkpoint else contextlib.nullcontext()
    # As an argument, the model would get a new Python object for every array at every call.
    loss_and_grad = nn.value_and_grad(model, lambda batch: loss_fn(model, batch))
    mx.random.seed(seed)
    model.train()
    total, gradients = mx.array(0.0), None
    try:
        with layers:
            for batch in batches:
                loss, new = loss_and_grad(batch)
                gradients = new if gradients is None else tree_map(mx.add, gradients, new)
                total = total + loss
                mx.eval(total, gradients)
    finally:
        model.eval()
    return total, gradients


def apply_update(
    model: nn.Module,
    optimizer: optim.Optimizer,
    gradients: dict,
    loss: mx.array,
    rate: float,
    step: int,
) -> None:
    """Update the parameters, or leave everything as it was and raise.

    Raises:
        TrainingError: the optimizer failed, or made a parameter that is not finite.
    """
    before = model.trainable_parameters(), tree_map(lambda x: x, optimizer.state)
    try:
        optimizer.learning_rate = rate
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state, loss)
        bad = not_finite(model.trainable_parameters())
        if bad:
            raise TrainingError(f"the optimizer made {bad[0]} not finite")
    except BaseException as error:  # an interrupt, too, must not leave half an update
        model.update(before[0])
        optimizer.state = before[1]
        if not isinstance(error, Exception):
            raise
        raise TrainingError(
            f"the optimizer failed at step {step} ({error})",
            cure="The weights are those before the step.",
        ) from error


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: a pure function of the run's seed and the step."""
    return ((seed & 0xFFFFFFFF) << 32) | (step & 0xFFFFFFFF)
