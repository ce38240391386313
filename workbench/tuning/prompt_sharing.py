"""Batches whose rows begin alike: a system prompt is computed once a batch, not once a row.

Exact: loss and gradients are those of the rows one beside the other, but for the order in which
the BLAS adds up (the tests hold the loss within 1e-6 and each gradient within 1e-5 of its largest
element). Not used where something drops out: the rows would share what is dropped.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.data.batches import Batch
from workbench.errors import FallbackWarning
from workbench.models.shared_prompt import find_shared_prompt
from workbench.tuning.dropout import first_dropout
from workbench.tuning.losses import LossFunction

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer


@dataclass(frozen=True)
class PromptSharing:
    """Whether a trainer computes what a batch's rows begin with once, and why."""

    used: bool
    reason: str

    def __str__(self) -> str:
        return f"prompt sharing {'on' if self.used else 'off'}: {self.reason}"


@dataclass(frozen=True)
class SharedPromptLoss:
    """A loss function whose model computes what the rows of a batch begin with once."""

    loss_fn: LossFunction

    def __call__(self, model: nn.Module, batch: Batch) -> mx.array:
        """Sum of the loss over the batch's supervised targets."""

        def states_at(tokens: np.ndarray, places: np.ndarray) -> mx.array:
            return model.states_at(tokens, places, find_shared_prompt(tokens))

        sharing = copy.copy(model)  # the same modules, by the same names
        sharing.states_at = states_at
        return self.loss_fn(sharing, batch)


def share_prompts(trainer: Trainer, own_loss: bool) -> PromptSharing:
    """Decide whether what rows begin with is computed once; if so, change the trainer's loss.

    Args:
        trainer: with model, configuration and loss function.
        own_loss: whether the loss function is the caller's: it may not ask the model like that.

    Warns:
        FallbackWarning: it was asked for and cannot be used.
    """
    wanted = trainer.config.shared_prompt
    if wanted is False:
        return PromptSharing(False, "switched off")
    reason = _hindrance(trainer.model, own_loss)
    if reason:
        if wanted:
            warnings.warn(f"no prompt sharing: {reason}", FallbackWarning, stacklevel=4)
        return PromptSharing(False, reason)
    trainer.loss_fn = SharedPromptLoss(trainer.loss_fn)
    return PromptSharing(True, "the tokens that all rows of a batch begin with are computed once")


def _hindrance(model: nn.Module, own_loss: bool) -> str:
    if own_loss:
        return "the loss function is the caller's own"
    if not getattr(model, "can_share_prompts", False):
        return f"a {type(model).__name__} cannot run on rows that share their beginning"
    dropout = first_dropout(model.named_modules())
    return f"{dropout} drops out" if dropout else ""
