"""The shift, the mask and cross-entropy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.data.batches import Batch, collate
from workbench.data.examples import Example
from workbench.errors import ConfigError, FallbackWarning
from workbench.models.heads import Head, find_head, logits_at
from workbench.models.trying import first_array
from workbench.tuning.fused_loss import fused_cross_entropy
from workbench.tuning.ranks import ALONE, Ranks

Array = mx.array | np.ndarray
Measures = dict[str, mx.array]  # sums over a batch, by name
# → sum over the batch's supervised targets, or its pairs; and what else it measures, likewise
LossFunction = Callable[[nn.Module, Batch], mx.array | tuple[mx.array, Measures]]


def next_token_pairs(tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
    """The one place where the shift stands: logits at t are trained against the token at t + 1.

    Args:
        tokens: (B, T) ids.
        mask: (B, T), whether token t is a target.

    Returns:
        inputs, targets, loss_mask, each (B, T - 1).
    """
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log softmax(logits)[target], in float32: logits (..., V), targets (...) → (...)."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="none")


def plain_loss(model: nn.Module, batch: Batch) -> mx.array:
    """Sum of cross-entropy over the supervised targets: the readable form.

    Computes logits at every position, then weighs by the mask. The caller divides by
    `batch.num_tokens`, once, after summing over micro-batches.
    """
    inputs, targets, loss_mask = next_token_pairs(mx.array(batch.tokens), mx.array(batch.loss_mask))
    losses = cross_entropy(first_array(model(inputs)), targets)  # (B, T - 1)
    return (losses * loss_mask).sum()


def supervised_loss(model: nn.Module, batch: Batch) -> mx.array:
    """The same sum, with logits at the supervised positions only.

    For models that part into `backbone` and `head`; the head and the softmax over the vocabulary
    are a third of the work, and in a chat most positions are not supervised. A model that has
    `states_at`, as ours, ends its last layer there, too.
    """
    hidden_states, targets = _supervised(model, batch)
    return cross_entropy(model.head(hidden_states), targets).sum()


def row_log_probs(model: nn.Module, batch: Batch) -> mx.array:
    """Σ log softmax(logits)[target] over each row's supervised targets: (B,) float32, in nats.

    Logits at the supervised positions only, for models as in `supervised_loss`.
    """
    if not _parts(model):
        inputs, targets, mask = next_token_pairs(mx.array(batch.tokens), mx.array(batch.loss_mask))
        return -(cross_entropy(first_array(model(inputs)), targets) * mask).sum(axis=-1)
    hidden_states, targets = _supervised(model, batch)
    losses = cross_entropy(model.head(hidden_states), targets)  # (N,)
    row_of, _ = np.nonzero(next_token_pairs(batch.tokens, batch.loss_mask)[2])  # (N,)
    # A product: what is scattered is added up in any order on a GPU.
    members = mx.array(row_of == np.arange(len(batch.tokens))[:, None]).astype(mx.float32)
    return -(members @ losses)


def fused_loss(model: nn.Module, batch: Batch) -> mx.array:
    """The same sum again, with the logits of some supervised positions at a time.

    Value and gradients are those of `supervised_loss` within 1e-4 relative: float32 sums are
    taken in another order.
    """
    return fused_cross_entropy(model, *_supervised(model, batch))


@dataclass(frozen=True)
class SupervisedHeadLoss:
    """The same sum for any model whose head was found; other models run whole.

    A stand-in in the head's place gathers the supervised positions, as `supervised_loss` does.
    """

    model: nn.Module
    head: Head

    def __call__(self, model: nn.Module, batch: Batch) -> mx.array:
        """Sum of cross-entropy over the batch's supervised targets."""
        inputs, targets, loss_mask = next_token_pairs(batch.tokens, batch.loss_mask)
        supervised = np.flatnonzero(loss_mask)
        if model is not self.model or not len(supervised):
            return plain_loss(model, batch)
        logits = logits_at(model, self.head, inputs, supervised)
        return cross_entropy(logits, mx.array(targets.reshape(-1)[supervised])).sum()


def default_loss(model: nn.Module, fused: bool | None = False) -> LossFunction:
    """Logits at the supervised positions only, wherever the model allows it.

    `supervised_loss` if the model parts into backbone and head, `SupervisedHeadLoss` if its head
    can be found and does what it should on a few tokens, else `plain_loss`.

    Args:
        model: decides which forms there are.
        fused: take `fused_loss`, which needs the two parts as well; None: if there are the two.

    Warns:
        FallbackWarning: the fused form is wanted, and the model has no such parts; or the logits
            must be computed at every position, and why.
    """
    if _parts(model):
        return supervised_loss if fused is False else fused_loss
    if fused:
        text = f"a {type(model).__name__} does not part into backbone and head"
        warnings.warn(f"no fused loss: {text}", FallbackWarning, stacklevel=2)
    try:
        return SupervisedHeadLoss(model, find_head(model))
    except ConfigError as error:
        text = f"logits at every position of a {type(model).__name__}: {error.what}"
        warnings.warn(text, FallbackWarning, stacklevel=2)
    return plain_loss


def chosen_loss(model: nn.Module, loss_fn: LossFunction | None, fused: bool | None) -> LossFunction:
    """The caller's loss function, if there is one; else `default_loss`.

    Warns:
        FallbackWarning: the fused form is wanted, and cannot be had.
    """
    if loss_fn is None:
        return default_loss(model, fused)
    if fused:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        text = f"no fused loss: the loss function {name} was given, and is used as it is"
        warnings.warn(text, FallbackWarning, stacklevel=3)
    return loss_fn


def mean_loss(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    loss_fn: LossFunction | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean cross-entropy in nats over all supervised targets, dropout off; None if stopped."""
    return mean_measures(model, examples, batch_size, loss_fn, stop)[0]


def mean_measures(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    loss_fn: LossFunction | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> tuple[float | None, dict[str, float]]:
    """The mean of a loss function over rows, dropout off, and of what else it measures.

    Each rank computes its share of the rows; what is returned is that of all. The loss is None,
    and nothing else is measured, if it was stopped on any rank, or there are no rows.
    """
    loss_fn, total, weight = loss_fn or default_loss(model), 0.0, 0
    sums: dict[str, float] = {}
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]))[
        ranks.rank :: ranks.size
    ]
    stopped = False
    try:
        for start in range(0, len(order), batch_size):
            stopped = stop()
            if stopped:
                break
            batch = collate(examples, order[start : start + batch_size])
            loss, measures = with_measures(loss_fn(model, batch))
            total += loss.item()
            sums.update({k: sums.get(k, 0.0) + value.item() for k, value in measures.items()})
            weight += batch.weight
    finally:
        model.train(was_training)
    parts = ranks.gather("validation", [stopped, total, weight, sums])
    weight = sum(part[2] for part in parts)
    if any(part[0] for part in parts) or not weight:
        return None, {}
    names = dict.fromkeys(name for part in parts for name in part[3])
    measured = {k: sum(part[3].get(k, 0.0) for part in parts) / weight for k in names}
    return sum(part[1] for part in parts) / weight, measured


def with_measures(output: mx.array | tuple[mx.array, Measures]) -> tuple[mx.array, Measures]:
    """What a loss function returned, as its sum and what else it measures."""
    return output if isinstance(output, tuple) else (output, {})


def _parts(model: nn.Module) -> bool:
    """Whether the model parts into backbone and head."""
    return callable(getattr(model, "backbone", None)) and callable(getattr(model, "head", None))


def _supervised(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Hidden states (N, D) at the N supervised positions, and their targets (N,)."""
    inputs, targets, loss_mask = next_token_pairs(batch.tokens, batch.loss_mask)
    supervised = np.flatnonzero(loss_mask)
    targets = mx.array(targets.reshape(-1)[supervised])
    if callable(getattr(model, "states_at", None)):
        return model.states_at(inputs, supervised), targets
    hidden_states = model.backbone(mx.array(inputs))  # (B, T - 1, D)
    return hidden_states.reshape(-1, hidden_states.shape[-1])[mx.array(supervised)], targets
