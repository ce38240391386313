"""Tiny architectures as base models, and rows of tokens that fit their vocabulary."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten

from tests.architecture_settings import VOCAB_SIZE
from tests.architectures import ARCHITECTURES
from tests.toy import toy_examples, toy_tokenizer
from workbench.data.examples import Example
from workbench.models.loading import BaseModel
from workbench.models.report import compare


def small(name: str) -> nn.Module:
    """The network, whole enough to be trained."""
    # With seed 0 a gate of recurrent_gemma closes: sqrt(1 - a²) at 0, whose slope is infinite.
    model = ARCHITECTURES[name].build(seed=2)
    nn.Module.__init__(model)  # recurrent_gemma's own leaves that out
    model.eval()
    return model


def small_base(name: str) -> BaseModel:
    """The network as `load_model` would return it; the tokenizer is for its type only."""
    model = small(name)
    parameters = dict(tree_flatten(model.parameters()))
    report = compare(parameters, parameters, source="toy")
    raw_config = {"model_type": ARCHITECTURES[name].module}
    return BaseModel(
        model,
        toy_tokenizer(),
        getattr(model, "args", raw_config),
        report,
        name,
        Path("toy"),
        raw_config,
    )


def small_rows(lengths: list[int], seed: int = 0) -> list[Example]:
    """Random tokens of the small vocabulary."""
    rows = toy_examples(lengths, seed)
    for row in rows:
        row.tokens[:] %= VOCAB_SIZE
    return rows
