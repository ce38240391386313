"""Toy rows that carry authority weight and provenance entropy, and trainers on them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

from tests.toy import toy_base, toy_dataset
from workbench.data.datasets import Dataset
from workbench.data.examples import Example
from workbench.errors import ObjectiveWarning
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.provenance import ProvenanceConfig
from workbench.tuning.trainer import Trainer

LENGTHS = (7, 30, 12, 9, 21, 15)  # tokens a row
PROVENANCE = ((0.0, 7.0), (0.95, 0.2), (0.5, 3.0), (0.9, 2.3), (0.3, 1.5), (0.99, 0.0))  # w, H


def with_provenance(
    examples: Sequence[Example], values: Sequence[tuple[float, float]] = PROVENANCE
) -> list[Example]:
    """The rows, each with its (w, H)."""
    return [
        dataclasses.replace(example, authority_weight=w, provenance_entropy=entropy)
        for example, (w, entropy) in zip(examples, values, strict=True)
    ]


def toy_documents(values: Sequence[tuple[float, float]] = PROVENANCE, valid=()) -> Dataset:
    """Ragged random rows; those for validation carry no provenance."""
    data = toy_dataset(LENGTHS[: len(values)], valid)
    return dataclasses.replace(data, train=with_provenance(data.train, values))


def provenance_trainer(
    kind: str | None = "weighted",
    *,
    data: Dataset | None = None,
    valid=(),
    lora: dict | None = None,
    objective: dict | None = None,
    run_dir=None,
    **settings,
) -> Trainer:
    """A trainer on fresh toy weights; without a kind, of the next token."""
    base = toy_base()
    add_lora(base.model, LoRAConfig(**{"rank": 4, **(lora or {})}))
    config = TrainConfig(**{"micro_batch_size": 4, "learning_rate": 1e-2, **settings})
    chosen = ProvenanceConfig(kind, **(objective or {})) if kind else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ObjectiveWarning)
        return Trainer(base, data or toy_documents(valid=valid), config, run_dir, objective=chosen)
