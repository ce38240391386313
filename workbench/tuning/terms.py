"""A loss as a sum of named terms, each with its own gradient."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from workbench.data.batches import Batch
from workbench.tuning.losses import LossFunction, with_measures
from workbench.tuning.prefix_cache import PrefixLoss
from workbench.tuning.prompt_sharing import SharedPromptLoss

CROSS_ENTROPY = "cross_entropy"  # the term, or measure, that a step's report calls its loss


@dataclass(frozen=True)
class Term:
    """A part of what a trainer minimises: factor · Σ loss_fn / Σ count over a step's batches.

    As a function of (model, batch) it is the term of that batch alone, as `check_training` takes
    terms.
    """

    loss_fn: LossFunction
    name: str = ""  # that its value and gradient norm are reported by; "": the loss is this alone
    factor: float = 1.0
    count: Callable[[Batch], int] = operator.attrgetter("weight")  # supervised targets, or pairs

    def __call__(self, model: nn.Module, batch: Batch) -> mx.array:
        """The term of one batch: a scalar."""
        loss, _ = with_measures(self.loss_fn(model, batch))
        return self.factor * (loss / self.count(batch))


def num_rows(batch: Batch) -> int:
    """Rows of the data in a batch: what a mean over documents is divided by."""
    return len(batch.rows)


def with_innermost(loss_fn: LossFunction, innermost: LossFunction) -> LossFunction:
    """Another loss function, in the same prefix cache and prompt sharing as a trainer's own."""
    if isinstance(loss_fn, PrefixLoss | SharedPromptLoss):
        return dataclasses.replace(loss_fn, loss_fn=with_innermost(loss_fn.loss_fn, innermost))
    return innermost
