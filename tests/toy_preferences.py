"""Toy preference pairs, and trainers on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.toy import SPECIAL, VOCAB_SIZE, toy_base
from workbench.data.examples import Example
from workbench.data.preferences import PreferenceDataset, PreferencePair
from workbench.tuning.config import TrainConfig
from workbench.tuning.dpo import DPOConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.trainer import Trainer

RAGGED = [(3, 5), (9, 2), (4, 4), (12, 7), (2, 11), (6, 8)]  # tokens of each answer


def toy_pairs(
    lengths: Sequence[tuple[int, int]], seed: int = 0, prompt: int = 4
) -> list[PreferencePair]:
    """Random prompts of `prompt` tokens with two random answers of these lengths."""
    random = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return random.integers(len(SPECIAL), VOCAB_SIZE, count, dtype=np.int32)

    pairs = []
    for row, answers in enumerate(lengths):
        asked = draw(prompt)
        sides = [
            Example(
                np.concatenate([asked, draw(length)]),
                np.arange(prompt + length) >= prompt,
                f"toy pair {row}",
            )
            for length in answers
        ]
        pairs.append(PreferencePair(*sides, f"toy pair {row}"))
    return pairs


def toy_preferences(lengths=RAGGED, valid=(), seed: int = 0) -> PreferenceDataset:
    """A data set of such pairs."""
    return PreferenceDataset("toy pairs", toy_pairs(lengths, seed), toy_pairs(valid, seed + 1))


def dpo_trainer(lengths=RAGGED, *, valid=(), data=None, objective=None, lora=None, **settings):
    """A trainer on a fresh toy model with an adapter on all linear layers, and such pairs."""
    kept = {k: settings.pop(k) for k in ("run_dir", "allow_changes") if k in settings}
    base = toy_base()
    add_lora(base.model, LoRAConfig(**{"rank": 4, **(lora or {})}))
    data = data or toy_preferences(lengths, valid)
    config = TrainConfig(**{"micro_batch_size": 3, "learning_rate": 1e-2, **settings})
    return Trainer(base, data, config, objective=objective or DPOConfig(), **kept)
