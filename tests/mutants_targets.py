"""Losses with one fault each, and two that are right: targets, mask, padding, reduction.

Each fault is a few lines over the correct form.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import default_loss as mlx_lm_loss

from tests.toy_checks import PROMPT, adapted, arrays, checked, loss_and_gradients
from workbench.data.batches import PAD_ID
from workbench.models.llama import Llama
from workbench.probes.findings import CheckReport
from workbench.tuning.losses import cross_entropy, plain_loss

# The shift


def no_shift(model, batch):
    """Trains each position against its own token."""
    inputs, _, loss_mask = arrays(batch)
    return (cross_entropy(model(inputs), inputs) * loss_mask).sum()


def shift_by_two(model, batch):
    """Trains each position against the token after the next."""
    inputs, targets, loss_mask = arrays(batch)
    return (cross_entropy(model(inputs)[:, :-1], targets[:, 1:]) * loss_mask[:, 1:]).sum()


class DropsItsLast(Llama):
    """Shifts by itself: no logits for the last token."""

    def __call__(self, tokens, cache=None, padding=None):
        return super().__call__(tokens[:, :-1], cache, padding)


class MovesItsLogits(Llama):
    """Shifts by itself: its output begins with the logits of the second token."""

    def __call__(self, tokens, cache=None, padding=None):
        return super().__call__(tokens, cache, padding)[:, 1:]


def loss_of_shifting_model(cut: slice) -> Callable:
    """Shifts as well, and cuts the targets to fit."""

    def loss_fn(model, batch):
        inputs, targets, loss_mask = arrays(batch)
        return (cross_entropy(model(inputs), targets[:, cut]) * loss_mask[:, cut]).sum()

    return loss_fn


def shifting(kind: type[Llama], cut: slice) -> CheckReport:
    """The report of a model and a loss that both shift."""
    model = adapted()
    model.__class__ = kind
    return checked(loss_of_shifting_model(cut), model)


# The mask and the padding


def mask_ignored(model, batch):
    """Trains prompt and padding too."""
    inputs, targets, _ = arrays(batch)
    return cross_entropy(model(inputs), targets).sum()


def prompt_trained(model, batch):
    """Masks the padding only."""
    inputs, targets, _ = arrays(batch)
    return (cross_entropy(model(inputs), targets) * (targets != PAD_ID)).sum()


def mask_not_shifted(model, batch):
    """Takes the mask of the inputs for that of the targets."""
    inputs, targets, _ = arrays(batch)
    return (cross_entropy(model(inputs), targets) * mx.array(batch.loss_mask)[:, :-1]).sum()


def mlx_lm_default_loss(model, batch):
    """mlx-lm's own, given what its batches hold: offset and length of each row."""
    lengths = [(PROMPT, int(row.nonzero()[0].max()) + 1) for row in batch.loss_mask]
    return mlx_lm_loss(model, mx.array(batch.tokens), mx.array(lengths))


# The reduction


def mean_of_rows(model, batch):
    """Averages each row, then the rows."""
    inputs, targets, loss_mask = arrays(batch)
    losses = cross_entropy(model(inputs), targets) * loss_mask
    return (losses.sum(axis=1) / loss_mask.sum(axis=1)).mean()


def mean_of_positions(model, batch):
    """Divides by all positions, masked ones included."""
    inputs, targets, loss_mask = arrays(batch)
    return (cross_entropy(model(inputs), targets) * loss_mask).mean()


def averaged_micro_batches(model, batches):
    """Averages the means of micro-batches, whatever number of targets each has."""
    gradients = [loss_and_gradients(model, batch)[1] for batch in batches]
    return tree_map(lambda *g: sum(g) / len(g), *gradients)


def weighted_micro_batches(model, batches):
    """Right: sums over micro-batches, divided by all their targets once."""
    total = sum(batch.num_tokens for batch in batches)
    gradients = [nn.value_and_grad(model, plain_loss)(model, batch)[1] for batch in batches]
    return tree_map(lambda *g: sum(g) / total, *gradients)


# The loss as a function of the model


def dropout_left_on(model, batch):
    """Turns dropout on by itself."""
    model.train()
    return plain_loss(model, batch)


def tokens_dropped(model, batch):
    """Drops a tenth of the targets by the ambient random state."""
    inputs, targets, loss_mask = arrays(batch)
    keep = mx.random.uniform(shape=targets.shape) > 0.1
    return (cross_entropy(model(inputs), targets) * loss_mask * keep).sum()


def another_model() -> CheckReport:
    """The report of a loss that closes over a model of its own."""
    other = adapted()
    return checked(lambda model, batch: plain_loss(other, batch))
