"""Direct preference optimisation (Rafailov et al. 2023, Direct Preference Optimization, section 4).

For a prompt x with the answers y_w, chosen, and y_l, rejected:

    margin = β [(log π(y_w | x) − log π_ref(y_w | x)) − (log π(y_l | x) − log π_ref(y_l | x))]
    loss = −log σ(margin)                                                   (equation 7)

log π(y | x) is the sum over the answer's tokens. π is the network with its adapter, π_ref the same
network with the adapter switched off. A step's loss is the mean over its pairs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from workbench.data.batches import Batch
from workbench.data.examples import all_sides
from workbench.data.preferences import PreferenceDataset
from workbench.errors import ConfigError, FallbackWarning, check_number
from workbench.tuning.losses import Measures, row_log_probs
from workbench.tuning.references import References

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


@dataclass(frozen=True)
class DPOConfig:
    """Train an adapter to prefer the chosen answers to the rejected ones."""

    beta: float = 0.1  # above 0: the larger, the nearer to the base the adapter stays
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round, below 0.5
    loss_type: str = "sigmoid"  # or hinge, ipo (see preference_losses)

    def __post_init__(self):
        check_number("beta", self.beta, 0)
        check_number("label_smoothing", self.label_smoothing, 0)
        if self.beta == 0:
            raise ConfigError("beta must be above 0, or nothing is preferred")
        if self.loss_type not in LOSS_TYPES:
            what = f"unknown loss_type {self.loss_type!r}"
            raise ConfigError(what, cure=f"Use one of {LOSS_TYPES}.")
        if self.label_smoothing >= 0.5:
            raise ConfigError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing!r}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ConfigError(f"label_smoothing has no meaning for the loss_type {self.loss_type}")


def preference_losses(margins: mx.array, config: DPOConfig) -> mx.array:
    """Losses (P,) of P pairs by their margins (P,), with ε = label_smoothing.

    sigmoid: −(1 − ε) log σ(margin) − ε log σ(−margin) (with ε: Mitchell 2023, A note on DPO with
    noisy preferences, equation 3); hinge: max(0, 1 − margin) (Zhao et al. 2023, SLiC-HF, section
    2.2); ipo: (margin / β − 1 / 2β)² (Azar et al. 2023, A general theoretical paradigm, equation
    17).
    """
    if config.loss_type == "hinge":
        return mx.maximum(0, 1 - margins)
    if config.loss_type == "ipo":
        return mx.square(margins / config.beta - 1 / (2 * config.beta))
    smoothing = config.label_smoothing
    wrong = smoothing * mx.logaddexp(0, margins) if smoothing else 0
    return (1 - smoothing) * mx.logaddexp(0, -margins) + wrong


class DPOLoss:
    """A loss function on batches of pairs: the sum of `preference_losses`, and what it measures.

    The measures are sums over the pairs: `accuracy`, of margins above zero; `margin`;
    `chosen_shift` and `rejected_shift`, log π − log π_ref of the sides, in nats.

    Args:
        config: the form of the loss.
        references: log-probabilities of the base.
    """

    def __init__(self, config: DPOConfig, references: References):
        self.config, self.references = config, references

    def __str__(self) -> str:
        made, config = self.references, self.config
        return (
            f"DPO ({config.loss_type}, beta {config.beta:g}): reference log-probabilities of "
            f"{len(made)} sequences, computed once in {made.seconds:.1f} s"
        )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[mx.array, Measures]:
        """Sum of the loss over the batch's pairs, and sums of what else is measured."""
        shifts = row_log_probs(model, batch) - self.references(batch)  # (2 P,)
        chosen, rejected = mx.split(shifts, 2)
        margins = self.config.beta * (chosen - rejected)
        measures = {
            "accuracy": margins > 0,
            "margin": margins,
            "chosen_shift": chosen,
            "rejected_shift": rejected,
        }
        sums = {name: mx.stop_gradient(values).sum() for name, values in measures.items()}
        return preference_losses(margins, self.config).sum(), sums


def use_dpo(trainer: Trainer, config: DPOConfig) -> DPOLoss:
    """Let the trainer's loss be that of preferences; computes the references.

    Raises:
        ConfigError: the data are no pairs.
        TrainingError: see `References`.

    Warns:
        FallbackWarning: the fused loss was asked for.
    """
    data = trainer.data
    if not isinstance(data, PreferenceDataset):
        raise ConfigError(
            f"DPO needs preference pairs, {data.name} holds {data.unit}",
            cure="Load them with wb.load_preferences(…).",
        )
    if trainer.config.fused_loss:
        text = "no fused loss: DPO needs the sum of each row, not of all"
        warnings.warn(text, FallbackWarning, stacklevel=4)
    references = References(trainer.model, all_sides([*data.train, *data.valid]))
    trainer.loss_fn = DPOLoss(config, references)
    return trainer.loss_fn
