"""What is trained: the next token, preferences, or rows by their provenance; as named terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.data.preferences import PreferenceDataset
from workbench.errors import ConfigError
from workbench.tuning.dpo import DPOConfig, DPOLoss, use_dpo
from workbench.tuning.provenance import ProvenanceConfig, ProvenanceObjective, use_provenance
from workbench.tuning.terms import CROSS_ENTROPY, Term

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer

ObjectiveConfig = DPOConfig | ProvenanceConfig
Objective = DPOLoss | ProvenanceObjective


def use_objective(
    trainer: Trainer, objective: ObjectiveConfig | None, own_loss: bool
) -> Objective | None:
    """Prepare what a trainer minimises; DPO puts its loss function in the trainer's place.

    Args:
        trainer: with model, data, configuration and loss function.
        objective: of the training; None for the next token.
        own_loss: whether the loss function is the caller's.

    Raises:
        ConfigError: data, objective and loss function do not go together.
        DataError: see `ProvenanceObjective`.
        TrainingError: see `References`.

    Warns:
        FallbackWarning: the fused loss was asked for, and cannot be had.
        ObjectiveWarning: a term of the loss will train nothing.
    """
    if objective is None:
        if isinstance(trainer.data, PreferenceDataset) and not own_loss:
            cure = "Give Trainer objective=wb.DPOConfig()."
            raise ConfigError("preference pairs need an objective", cure=cure)
        return None
    if not isinstance(objective, ObjectiveConfig):
        kinds, given = "a DPOConfig or a ProvenanceConfig", type(objective).__name__
        raise ConfigError(f"objective must be {kinds}, got {given}")
    if own_loss:
        raise ConfigError("a loss_fn and an objective exclude each other", cure="Give one.")
    prepare = use_dpo if isinstance(objective, DPOConfig) else use_provenance
    return prepare(trainer, objective)


def terms_of(trainer: Trainer) -> tuple[Term, ...]:
    """The terms whose sum a trainer minimises: of the next token and of DPO, one."""
    if isinstance(trainer.objective, ProvenanceObjective):
        return trainer.objective.terms(trainer.loss_fn)
    return (Term(trainer.loss_fn),)


def loss_terms(trainer: Trainer) -> dict[str, Term]:
    """A trainer's terms by name, as functions of (model, batch): for `check_training(terms=…)`."""
    return {term.name or _name_of(trainer): term for term in terms_of(trainer)}


def _name_of(trainer: Trainer) -> str:
    return CROSS_ENTROPY if trainer.objective is None else "preferences"
