"""The provenance ("empirical distrust") loss: as the earlier systems had it, and one that trains.

A row's document has an authority weight w, 0 ≤ w ≤ 0.99, and a provenance entropy H ≥ 0, in bits:

    d = ln(1 − w + 1e-8) + H,   L = α d²                       (α = 2.7, between 2.3 and 3)
    additive:   total = CE + λ · mean(L)                       (REQUIREMENTS.md, R32)
    weighted:   total = Σ k CE / targets,   k = d² / mean(d²)  (R33, an extension of ours)

CE is the mean cross-entropy over the supervised targets. L is made of the data alone: no parameter
stands in it, so `additive` has no gradient and changes no update, whatever α and λ are. `weighted`
lets it reach the parameters: each row's cross-entropy counts k times, and α cancels. k is nought
where H = −ln(1 − w), and grows on both sides of it: with distrust, and with authority.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.data.batches import Batch
from workbench.data.examples import Example
from workbench.data.preferences import PreferenceDataset
from workbench.data.rows import PROVENANCE_RANGES, provenance_of
from workbench.data.streams import StreamDataset
from workbench.errors import (
    ConfigError,
    DataError,
    FallbackWarning,
    ObjectiveWarning,
    check_number,
)
from workbench.tuning.losses import LossFunction, Measures, row_log_probs
from workbench.tuning.terms import CROSS_ENTROPY, Term, num_rows, with_innermost

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer

KINDS = ("additive", "weighted")
ALPHAS = (2.3, 3.0)
EPSILON = 1e-8
TYPICAL_LOSS = 5.0  # nats a target, that λ·mean(L) is brought to
COUNTED_ROWS = 100  # from the start of the training data, for λ
LARGEST_FACTOR = 1e30  # float32 still holds it times any d² that a text can have
WEIGHTS = (0.001, 1.0)  # of an automatic λ
IN_WORDS = "it is made of the data alone, has no gradient and changes no update"


@dataclass(frozen=True)
class ProvenanceConfig:
    """Train on rows that carry authority weight and provenance entropy (see this module).

    `additive` reports a term and trains nothing by it; `weighted` is an extension that does train.
    """

    kind: str = "additive"  # or weighted
    alpha: float = 2.7  # in [2.3, 3]; in `weighted` it cancels
    weight: float | str = "auto"  # λ of `additive`, from 0; "auto": see `automatic_weight`
    force_alpha: bool = False  # take an alpha outside its range

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind {self.kind!r} of provenance", cure=f"Use {KINDS}.")
        if not isinstance(self.force_alpha, bool):
            raise ConfigError(f"force_alpha must be True or False: {self.force_alpha!r}")
        _check_factor("alpha", self.alpha)
        if not self.alpha or not (self.force_alpha or ALPHAS[0] <= self.alpha <= ALPHAS[1]):
            raise ConfigError(
                f"alpha is {self.alpha!r}, outside [{ALPHAS[0]:g}, {ALPHAS[1]:g}]",
                cure="Take one within, or, if it is above 0, give force_alpha=True.",
            )
        if self.weight == "auto":
            return
        if self.kind == "weighted":
            cure = "Leave weight at 'auto'; it is the λ of the additive term."
            raise ConfigError("the kind weighted has no weight λ", cure=cure)
        _check_factor("weight", self.weight)


def _check_factor(name: str, value: object) -> None:
    check_number(name, value, 0)
    if value > LARGEST_FACTOR:
        raise ConfigError(f"{name} must be at most {LARGEST_FACTOR:g}, got {value!r}")


def squared_distances(authority_weight: np.ndarray, provenance_entropy: np.ndarray) -> np.ndarray:
    """d² = (ln(1 − w + 1e-8) + H)², in float64, of arrays of one shape.

    Raises:
        DataError: a value is outside its range; says at which index.
    """
    columns = zip(PROVENANCE_RANGES.items(), (authority_weight, provenance_entropy))
    arrays = []
    for (key, (lowest, highest)), values in columns:
        array = np.asarray(values, dtype=np.float64)
        bad = np.argwhere(~((lowest <= array) & (array <= highest) & np.isfinite(array)))
        if len(bad):
            index = tuple(bad[0].tolist())
            raise DataError(
                f"{key} {array[index]} is not in [{lowest:g}, {highest:g}]",
                where=f"row {', '.join(map(str, index))}" if index else "",
            )
        arrays.append(array)
    return np.square(np.log(1 - arrays[0] + EPSILON) + arrays[1])


def automatic_weight(losses: np.ndarray) -> float:
    """λ that brings λ·mean(L) to 5.0, a typical cross-entropy, within [0.001, 1].

    Args:
        losses: (N,) L of the training rows, in their order; the first 100 count.
    """
    mean = float(np.mean(losses[:COUNTED_ROWS]))
    return float(np.clip(TYPICAL_LOSS / mean if mean else np.inf, *WEIGHTS))


class ProvenanceObjective:
    """The terms of a provenance loss, on rows that were all looked at.

    Args:
        config: kind, α and λ; an automatic λ is computed here, from the first 100 rows.
        examples: the training rows.

    Raises:
        DataError: a row has no authority weight or entropy, or one out of range; no row weighs, or
            there are none in memory.
    """

    def __init__(self, config: ProvenanceConfig, examples: Sequence[Example]):
        if not examples:
            what = "a provenance objective looks at all training rows before the first step"
            raise DataError(f"{what}; there are none", cure="Load them with wb.load_dataset(…).")
        self.squares = squared_distances(*_columns(examples))  # (N,) of the training rows
        losses = config.alpha * self.squares
        with np.errstate(over="ignore"):
            large = np.flatnonzero(~np.isfinite(losses.astype(np.float32)))
        if len(large):
            what = f"its provenance loss {losses[large[0]]:.3g} is too large for float32"
            raise DataError(what, where=examples[large[0]].where)
        if config.kind == "weighted" and not self.squares.any():
            what = "every row has H = −ln(1 − w), so that none weighs anything"
            raise DataError(what, cure="Train without an objective, or score the rows anew.")
        if config.kind == "additive" and config.weight == "auto":
            config = dataclasses.replace(config, weight=automatic_weight(losses))
        self.config = config

    def __str__(self) -> str:
        alpha, mean = self.config.alpha, self.squares.mean()
        if self.config.kind == "additive":
            value = self.config.weight * alpha * mean
            return (
                f"provenance (additive, alpha {alpha:g}, weight {self.config.weight:.4g}): adds "
                f"{value:.4g} to the loss on average; {IN_WORDS}"
            )
        weights = self.row_weights
        return (
            f"provenance (weighted, an extension): each row's cross-entropy counts d² / "
            f"{mean:.4g} times, from {weights.min():.3g} to {weights.max():.3g}; the "
            f"{len(weights)} rows weigh as {weights.sum() ** 2 / np.square(weights).sum():.1f} "
            "equal ones would"
        )

    @property
    def row_weights(self) -> np.ndarray:
        """(N,) d² of the training rows, normalised to mean 1: what `weighted` multiplies by."""
        return self.squares / self.squares.mean()

    def terms(self, loss_fn: LossFunction) -> tuple[Term, ...]:
        """The terms of the total.

        Args:
            loss_fn: the trainer's, of plain cross-entropy.
        """
        if self.config.kind == "weighted":
            weighted = with_innermost(loss_fn, self.weighted_sum)
            return (Term(weighted, f"weighted_{CROSS_ENTROPY}"),)
        factor = float(self.config.weight)
        return (
            Term(loss_fn, CROSS_ENTROPY),
            Term(self.additive_sum, "provenance", factor, num_rows),
        )

    def additive_sum(self, model: nn.Module, batch: Batch) -> mx.array:
        """Σ L over the batch's rows. The model does not stand in it."""
        return mx.array(self.config.alpha * _squares(batch), dtype=mx.float32).sum()

    def weighted_sum(self, model: nn.Module, batch: Batch) -> tuple[mx.array, Measures]:
        """Σ k CE over the batch's supervised targets; and, measured beside it, Σ CE."""
        losses = -row_log_probs(model, batch)  # (B,)
        weights = mx.array(_squares(batch) / self.squares.mean(), dtype=mx.float32)  # (B,)
        return (weights * losses).sum(), {CROSS_ENTROPY: mx.stop_gradient(losses).sum()}


def use_provenance(trainer: Trainer, config: ProvenanceConfig) -> ProvenanceObjective:
    """The objective on a trainer's rows; its loss function stays plain cross-entropy.

    Validation, and with it the best checkpoint, goes by that.

    Raises:
        ConfigError: the data are preference pairs, or a stream.
        DataError: see `ProvenanceObjective`.

    Warns:
        ObjectiveWarning: the term will train nothing.
        FallbackWarning: the fused loss was asked for, and the rows are weighted.
    """
    if isinstance(trainer.data, PreferenceDataset):
        raise ConfigError(
            f"a provenance objective needs rows, {trainer.data.name} holds {trainer.data.unit}",
            cure="Load them with wb.load_dataset(…).",
        )
    if isinstance(trainer.data, StreamDataset):
        raise ConfigError(
            "a stream cannot be weighed: a provenance objective must know all rows beforehand",
            cure="Load them with wb.load_dataset(…, provenance='score').",
        )
    objective = ProvenanceObjective(config, trainer.data.train)
    if config.kind == "additive":
        text = f"the additive provenance term trains nothing: {IN_WORDS}"
        warnings.warn(f"{text}. kind='weighted' does train.", ObjectiveWarning, stacklevel=4)
    elif trainer.config.fused_loss:
        text = "no fused loss in the update: the weighted form needs the sum of each row"
        warnings.warn(text, FallbackWarning, stacklevel=4)
    return objective


def _columns(examples: Iterable[Example]) -> tuple[list[float], list[float]]:
    """Authority weights and entropies of rows that must have them."""
    rows = []
    for example in examples:
        given = {key: getattr(example, key) for key in PROVENANCE_RANGES}
        for key, value in provenance_of(given, example.where).items():
            if value is None:
                raise DataError(
                    f"has no {key!r}",
                    where=example.where,
                    cure="Score the rows: wb.add_provenance(…), or load_dataset's provenance.",
                )
        rows.append(tuple(given.values()))
    weights, entropies = zip(*rows)
    return list(weights), list(entropies)


def _squares(batch: Batch) -> np.ndarray:
    """d² of a batch's rows (B,), in float64."""
    if batch.authority_weight is None or batch.provenance_entropy is None:
        raise DataError("the batch has rows without authority weight or provenance entropy")
    return squared_distances(batch.authority_weight, batch.provenance_entropy)
