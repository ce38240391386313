"""Log-probabilities of rows under the base model: the network with its adapter switched off."""

from __future__ import annotations

import time
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from workbench.data.batches import Batch, collate
from workbench.data.examples import Example
from workbench.errors import TrainingError
from workbench.probes.parameters import WatchedWeights
from workbench.tuning.lora import adapter_disabled
from workbench.tuning.lora_layers import LoRALinear
from workbench.tuning.losses import next_token_pairs, row_log_probs
from workbench.tuning.prompt_sharing import SharedPromptLoss

GROUP_POSITIONS = 1024  # of rows that are computed together


class References:
    """`row_log_probs` of the base, computed once for each row; no second copy of the weights.

    What is held belongs to `key`, the hash of the frozen weights, and to the row's tokens and
    targets. When other weights are put into the network, nothing held is used again. The data
    alone decides which rows are computed together, so that a resumed run has the same bits.
    Writing into a weight's elements in place is not noticed.

    Args:
        model: whatever trains in it belongs to its adapter.
        examples: rows that are computed now; others when they are asked for.

    Raises:
        TrainingError: something trains that switching the adapter off does not take out.
    """

    def __init__(self, model: nn.Module, examples: Iterable[Example] = ()):
        _require_adapter(model)
        self.model = model
        self._groups = _groups(examples)
        self._watched = WatchedWeights(self._weights())
        started = time.perf_counter()
        self._held = self._computed()
        self.seconds = time.perf_counter() - started  # that the computation took

    @property
    def key(self) -> str:
        """Hash of the frozen weights."""
        return self._watched.key

    def __len__(self) -> int:
        """Rows that are held."""
        return len(self._held)

    def __call__(self, batch: Batch) -> mx.array:
        """(B,) float32, in nats: a constant for the gradient."""
        if self._watched.replaced(self._weights()):
            self._held = self._computed()
        contents = [_content(*row) for row in zip(batch.tokens, batch.loss_mask)]
        for content, row in zip(contents, zip(batch.tokens, batch.loss_mask)):
            if content not in self._held:
                self._held |= self._group([_as_example(*row)])
        return mx.array([self._held[content] for content in contents])

    def _computed(self) -> dict[bytes, float]:
        return {k: v for group in self._groups for k, v in self._group(group).items()}

    def _group(self, examples: list[Example]) -> dict[bytes, float]:
        shares = getattr(self.model, "can_share_prompts", False)
        log_probs = SharedPromptLoss(row_log_probs) if shares else row_log_probs
        was_training = self.model.training
        self.model.eval()
        try:
            with adapter_disabled(self.model):
                values = log_probs(self.model, collate(examples, range(len(examples)))).tolist()
        finally:
            self.model.train(was_training)
        return {_content(e.tokens, e.loss_mask): v for e, v in zip(examples, values)}

    def _weights(self) -> list[tuple[str, mx.array]]:
        adapted = _adapter_names(self.model)
        named = tree_flatten(self.model.parameters())
        return [(name, array) for name, array in named if name not in adapted]


def _require_adapter(model: nn.Module) -> None:
    adapted = _adapter_names(model)
    others = [name for name, _ in tree_flatten(model.trainable_parameters()) if name not in adapted]
    if others:
        raise TrainingError(
            f"{others[0]} trains and is no adapter's, so that the reference would move with it",
            cure="Train an adapter only: wb.add_lora(…) freezes all else.",
        )


def _adapter_names(model: nn.Module) -> set[str]:
    adapted = [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]
    return {f"{path}.{part}" for path, module in adapted for part in module.parts}


def _groups(examples: Iterable[Example]) -> list[list[Example]]:
    """Different rows, those of like length together, whatever their order in the data."""
    distinct = {_content(e.tokens, e.loss_mask): e for e in examples}
    groups: list[list[Example]] = []
    for _, row in sorted(distinct.items(), key=lambda item: (len(item[1]), item[0])):
        if not groups or (len(groups[-1]) + 1) * len(row) > GROUP_POSITIONS:
            groups.append([])
        groups[-1].append(row)
    return groups


def _content(tokens: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """A row up to its last target, which is all that its log-probability depends on."""
    _, _, targets = next_token_pairs(tokens[None], loss_mask[None])
    end = np.flatnonzero(targets[0])[-1:].sum() + 2
    return tokens[:end].astype("<i4").tobytes() + loss_mask[:end].astype("u1").tobytes()


def _as_example(tokens: np.ndarray, loss_mask: np.ndarray) -> Example:
    return Example(tokens, loss_mask, "a row of the batch")
