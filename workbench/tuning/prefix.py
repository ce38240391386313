"""Cached activations of the frozen part: the layers below the first trained one run once a row.

While they are frozen, what leaves them for a row is the same at every step. Here it is decided
whether that is so, and whether it pays; `prefix_cache` computes and keeps.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.data.examples import all_sides
from workbench.errors import ConfigError, FallbackWarning
from workbench.models.partial_runs import paths_above, try_beginning_at
from workbench.models.structure import find_layers
from workbench.tuning.config import TrainConfig
from workbench.tuning.dropout import first_dropout
from workbench.tuning.prefix_cache import (
    RAW,
    PrefixCache,
    PrefixLoss,
    below,
    distinct_rows,
    outline,
)

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer

# Uses of a row from which keeping pays: alone, short rows cost about 1.2 times what they cost in a
# batch (OpenBLAS, products of 40 rows against 320).
WORTHWHILE_USES = 1.5
MEGA = 1e6


@dataclass(frozen=True)
class PrefixUse:
    """Whether a trainer keeps what leaves its frozen layers, and why."""

    first_layer: int  # the first one that runs at every step; 0: all run
    needed_bytes: int  # for every row of the training and validation data; 0 where not used
    reason: str
    cache: PrefixCache | None = None

    @property
    def used(self) -> bool:
        """Whether states are kept."""
        return self.cache is not None

    def __str__(self) -> str:
        return f"prefix cache {'on' if self.used else 'off'}: {self.reason}"


def use_prefix(trainer: Trainer, own_loss: bool) -> PrefixUse:
    """Decide whether what leaves the frozen layers is kept; if so, change the trainer's loss.

    Args:
        trainer: with model, data, configuration and loss function.
        own_loss: whether the loss function is the caller's: it may not want the model shortened.

    Warns:
        FallbackWarning: it was asked for and cannot be used, or not for every row.
    """
    config, model = trainer.config, trainer.model
    if config.prefix_cache is False:
        return PrefixUse(0, 0, "switched off")
    first, reason = _first_layer_of(trainer, own_loss)
    if not first:
        return _refused(config, reason)
    shape = outline(model, first)
    examples = all_sides([*trainer.data.train, *trainer.data.valid])
    rows = distinct_rows(examples)
    needed = sum(map(len, rows)) * shape.shape[-1] * shape.dtype.size
    limit, size = config.prefix_cache_bytes, f"{needed / MEGA:.1f} MB"
    fits = f"needs {size}, prefix_cache_bytes allows {limit / MEGA:.1f} MB"
    if config.prefix_cache is None:
        if not _pays(trainer):
            return PrefixUse(0, 0, "the rows are not used often enough")
        if needed > limit:
            return PrefixUse(0, 0, fits)
    try:
        try_beginning_at(model, first)
    except ConfigError as error:
        return _refused(config, error.what)
    if needed > limit:
        text = f"the prefix cache {fits}: the other rows are computed at every step"
        warnings.warn(text, FallbackWarning, stacklevel=4)
    cache = PrefixCache(model, first, limit, examples if needed <= limit else ())
    trainer.loss_fn = PrefixLoss(cache, trainer.loss_fn)
    kept = size if needed <= limit else f"{limit / MEGA:.1f} of {size}"
    done = f"the layers below layer {first} run once a row; {kept} kept"
    return PrefixUse(first, needed, done, cache)


def _first_layer_of(trainer: Trainer, own_loss: bool) -> tuple[int, str]:
    """As `first_layer`, if loss function and data allow of keeping anything."""
    if own_loss:
        return 0, "the loss function is the caller's own"
    if trainer.plan is None:
        return 0, "the rows are streamed, and how many there are is not known"
    return first_layer(trainer.model)


def _pays(trainer: Trainer) -> bool:
    """Whether the rows are used so often that computing each alone costs less."""
    train = all_sides(trainer.data.train)
    uses = trainer.total_steps / trainer.plan.steps_per_epoch * len(train)
    return uses >= WORTHWHILE_USES * len(distinct_rows(train))


def _refused(config: TrainConfig, reason: str) -> PrefixUse:
    if config.prefix_cache:
        warnings.warn(f"no prefix cache: {reason}", FallbackWarning, stacklevel=5)
    return PrefixUse(0, 0, reason)


def first_layer(model: nn.Module) -> tuple[int, str]:
    """The first layer that holds what trains, and "" – or 0 and why all layers must run.

    With nothing in the layers that trains it is their number: the head alone is left.
    """
    try:
        path, count = find_layers(model)
        names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        within = [name.removeprefix(f"{path}.") for name in names if name.startswith(f"{path}.")]
        first = min((int(name.partition(".")[0]) for name in within), default=count)
        reason = _hindrance(model, first, names) if first else "the first layer trains"
    except ConfigError as error:
        reason = error.what
    return (0, reason) if reason else (first, "")


def _hindrance(model: nn.Module, first: int, trainable: list[str]) -> str:
    """Why what enters a layer is not the same at every step, or cannot be kept; "" if it can."""
    above = paths_above(model)
    trains = below(model, first, above, [(name, None) for name in trainable])
    if trains:
        return f"{trains[0][0]} trains, and is used below the layers"
    for name, _ in below(model, first, above, tree_flatten(model.parameters())):
        if "lora_" in name:  # its scale can be changed, and is no weight
            return f"{name} belongs to an adapter below layer {first}"
    dropout = first_dropout(below(model, first, above, model.named_modules()))
    if dropout:
        return f"{dropout} drops out below layer {first}"
    if outline(model, first).dtype.size not in RAW:
        return "the hidden states have a dtype that cannot be kept"
    return ""
