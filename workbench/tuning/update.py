"""One optimizer update: gradients over the micro-batches, then all of it or nothing."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from workbench.data.batches import Batch
from workbench.errors import NotFiniteError, TrainingError
from workbench.models.checkpointing import checkpointed_layers
from workbench.numerics import not_finite
from workbench.tuning.config import StepReport
from workbench.tuning.gradients import clip_by_global_norm
from workbench.tuning.losses import LossFunction, with_measures
from workbench.tuning.objectives import terms_of
from workbench.tuning.ranks import ALONE, Ranks
from workbench.tuning.refusals import require_finite, require_targets
from workbench.tuning.reporting import make_report
from workbench.tuning.terms import CROSS_ENTROPY, Term

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer

GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2 ** 64, odd: seeds of ranks lie far apart (Weyl sequence)


def make_update(trainer: Trainer) -> StepReport:
    """The trainer's next update; returns its report, which the trainer has not yet counted.

    Raises:
        TrainingError: loss or gradients are not finite, or the optimizer failed; weights and
            optimizer state are those before the update.
        DataError: none of the step's rows has a supervised target.
    """
    started, step, config = time.perf_counter(), trainer.steps_done, trainer.config
    batches = trainer.feed.batches(step)
    require_targets(batches, step + 1)
    weight, terms = sum(batch.weight for batch in batches), terms_of(trainer)
    seed, again = step_seed(config.seed, step, trainer.ranks.rank), config.grad_checkpoint
    total, gradients, extras = differentiate(
        trainer.model, terms, batches, seed, again, trainer.ranks
    )
    # A caller's own loss has no name, and may measure the cross-entropy beside it.
    loss = extras.get(CROSS_ENTROPY, total) if any(term.name for term in terms) else total
    clipped, norm = clip_by_global_norm(gradients, config.max_grad_norm, weight)
    places = [place for batch in batches for place in batch.places]
    try:
        require_finite(total, norm, gradients, step + 1, places)
    except NotFiniteError:
        skips = config.on_bad_step == "skip"
        if not skips or trainer.progress.bad_steps >= config.max_bad_steps:
            raise
        trainer.progress.bad_steps += 1
        return make_report(
            trainer, batches, loss.item(), norm.item(), started, extras, skipped=True
        )
    del gradients  # clipping writes over arrays that nobody else holds
    rate = trainer.learning_rate(step)
    apply_update(trainer.model, trainer.optimizer, clipped, loss, rate, step + 1)
    return make_report(trainer, batches, loss.item(), norm.item(), started, extras)


def differentiate(
    model: nn.Module,
    terms: Sequence[Term],
    batches: Sequence[Batch],
    seed: int,
    grad_checkpoint: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[mx.array, dict, dict[str, mx.array]]:
    """The sum of a step's terms, each differentiated by itself and with the same dropout.

    Each rank computes its share of the batches; what is returned is that of all.

    Returns:
        The total; the batches' weight times its gradients, which clipping divides by it; and by
        name the terms' values, gradient norms and measures, and the total of named terms.
    """
    weight = sum(batch.weight for batch in batches)
    total, gradients, reported = mx.array(0.0), None, {}
    mine, counts = ranks.share(batches)
    for term in terms:
        count, sums = sum(map(term.count, batches)), {}
        value, new = accumulate(model, term.loss_fn, mine, seed, grad_checkpoint, sums)
        value, new, sums = ranks.add_up((value, new, sums), counts)
        value = term.factor * (value / count)
        total = total + value
        reported |= {name: measure / count for name, measure in sums.items()}
        if term.name:
            norm = term.factor * clip_by_global_norm(new, 0, count)[1]
            reported |= {term.name: value, f"{term.name}_grad_norm": norm, "total": total}
            if gradients is not None and norm.item() == 0:
                continue  # adding nought would pass over every gradient, to change none
        scale = term.factor * weight / count
        new = new if scale == 1 else tree_map(functools.partial(mx.multiply, scale), new)
        gradients = new if gradients is None else tree_map(mx.add, gradients, new)
    return total, gradients, reported


def accumulate(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Sequence[Batch],
    seed: int,
    grad_checkpoint: bool = False,
    sums: dict[str, mx.array] | None = None,
) -> tuple[mx.array, dict]:
    """Sums of loss and gradients over micro-batches; each is evaluated before the next.

    Args:
        model: in training mode for the length of the call.
        loss_fn: see `LossFunction`.
        batches: the micro-batches of one step.
        seed: of dropout.
        grad_checkpoint: keep each layer's input only, and compute the layer again.
        sums: takes in what the loss function measures beside the loss, by name.
    """
    layers = checkpointed_layers(model) if grad_checkpoint else contextlib.nullcontext()
    # As an argument, the model would get a new Python object for every array at every call.
    loss_and_grad = nn.value_and_grad(model, lambda batch: with_measures(loss_fn(model, batch)))
    mx.random.seed(seed)
    model.train()
    total, gradients, sums = mx.array(0.0), None, {} if sums is None else sums
    try:
        with layers:
            for batch in batches:
                (loss, measures), new = loss_and_grad(batch)
                gradients = new if gradients is None else tree_map(mx.add, gradients, new)
                total = total + loss
                sums.update({k: sums.get(k, 0.0) + value for k, value in measures.items()})
                mx.eval(total, gradients, sums)
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


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step's dropout: a pure function of the run's seed, the step and the rank."""
    of_step = ((seed & 0xFFFFFFFF) << 32) | (step & 0xFFFFFFFF)
    return (of_step + rank * GOLDEN_RATIO) & 0xFFFFFFFFFFFFFFFF
