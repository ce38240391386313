"""Toy batches and toy models for the checks of training, and right code to begin from."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from tests.toy import toy_examples, toy_model
from workbench.data.batches import Batch, collate
from workbench.models.llama import Llama
from workbench.probes.findings import CheckReport, Finding
from workbench.probes.training import check_training
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import next_token_pairs, plain_loss

PROMPT = 3  # tokens of each row that are no targets
LENGTHS = (9, 14, 7, 12, 8, 10)
EXAMPLES = toy_examples(LENGTHS, seed=3, prompt=PROMPT)
BATCH = collate(EXAMPLES, range(4))  # three rows are padded
EVEN = collate(toy_examples([10] * 3, seed=4, prompt=PROMPT), range(3))  # no padding
MICRO_BATCHES = [collate(EXAMPLES, [2]), collate(EXAMPLES, [0, 1, 3])]  # 4 and 26 targets


def adapted(dropout: float = 0.0) -> Llama:
    """A toy model with a fresh adapter."""
    model = toy_model()
    add_lora(model, LoRAConfig(rank=4, dropout=dropout))
    return model


def arrays(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """inputs, targets, loss_mask (B, T - 1)."""
    return next_token_pairs(mx.array(batch.tokens), mx.array(batch.loss_mask))


def checked(
    loss_fn: Callable = plain_loss, model: nn.Module | None = None, batch=BATCH, **given
) -> CheckReport:
    """The report of a loss on the padded batch, the adapter training."""
    given.setdefault("mode", "lora")
    return check_training(model or adapted(), loss_fn, batch, **given)


def mean_loss(model, batch):
    """Right: the mean over the supervised targets, and how many there are."""
    return plain_loss(model, batch) / batch.num_tokens, batch.num_tokens


def loss_and_gradients(model: nn.Module, batch: Batch) -> tuple[mx.array, dict]:
    """The right ones, of the trainable parameters."""
    return nn.value_and_grad(model, mean_loss)(model, batch)


def failure(report: CheckReport, check: str) -> Finding:
    """The only failure under a heading."""
    (found,) = [finding for finding in report.failures if finding.check == check]
    return found
