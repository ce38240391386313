"""What a trainer refuses: rows that the network cannot take, steps that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from workbench.data.batches import Batch
from workbench.data.datasets import Dataset
from workbench.data.examples import Example, all_sides
from workbench.errors import ConfigError, DataError, NotFiniteError, check_kind
from workbench.models.loading import BaseModel, embedding_rows, require_base
from workbench.numerics import not_finite
from workbench.tuning.config import TrainConfig

NAMED_IN_ERROR = 5  # bad gradients that an error lists


def require_kinds(
    base: object, data: object, config: object
) -> tuple[BaseModel, Dataset, TrainConfig]:
    """A trainer's first arguments; raises ConfigError if they are others, or do not go together."""
    require_base(base)
    check_kind("data", data, Dataset, "Give what wb.load_dataset returns.")
    check_kind("config", config, TrainConfig, "Such as wb.TrainConfig(steps=100).")
    if config.patience and not (config.valid_every and data.valid):
        lacks = "validation rows" if config.valid_every else "valid_every"
        raise ConfigError(
            f"patience {config.patience} counts validations, and there is no {lacks}",
            cure="Give rows to validate on and valid_every, or set patience to 0.",
        )
    return base, data, config


def check_rows(data: Dataset, base: BaseModel) -> None:
    """Raise DataError if a row is none that the network can take, see `row_check`."""
    check = row_check(base)
    for example in all_sides([*data.train, *data.valid]):
        check(example)


def row_check(base: BaseModel) -> Callable[[Example], None]:
    """Raises DataError for ids that the embedding lacks, and for more tokens than positions."""
    vocab_size = embedding_rows(base.model, base.config)
    positions = getattr(base.config, "max_position_embeddings", None) or math.inf

    def check(example: Example) -> None:
        outside = example.tokens[(example.tokens < 0) | (example.tokens >= vocab_size)]
        if len(outside):
            raise DataError(
                f"token id {outside[0]} is outside the vocabulary of {vocab_size}",
                where=example.where,
                cure="Tokenise the data with this model's own tokenizer.",
            )
        if len(example) - 1 > positions:  # the last token is a target only
            raise DataError(
                f"has {len(example)} tokens, the model has room for {positions}",
                where=example.where,
                cure=f"Load the data with max_length={positions}.",
            )

    return check


def require_targets(batches: Sequence[Batch], step: int) -> None:
    """Raise DataError if a step's rows, which it names, have no supervised target at all."""
    if not any(batch.weight for batch in batches):
        places = [place for batch in batches for place in batch.places]
        raise DataError(
            f"step {step} has no supervised target",
            where=", ".join(places),
            cure="Of the tokens after a row's first, loss_mask must name at least one.",
        )


def require_finite(
    loss: mx.array, norm: mx.array, gradients: dict, step: int, places: Sequence[str]
) -> None:
    """Raise NotFiniteError, naming rows and parameters, if loss or gradient norm is not finite."""
    mx.eval(loss, norm)
    if math.isfinite(loss.item()) and math.isfinite(norm.item()):
        return
    bad = not_finite(gradients)
    named = ", ".join(bad[:NAMED_IN_ERROR]) + (", …" if len(bad) > NAMED_IN_ERROR else "")
    raise NotFiniteError(
        f"step {step} gave loss {loss.item()} and gradient norm {norm.item()} "
        f"({', '.join(places)}; gradients that are not finite: {named or 'none'})",
        cure="The step was not made. Lower the learning rate, or look at these rows.",
    )
