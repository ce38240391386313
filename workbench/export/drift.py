"""How far an export's logits are from the model's, next to how far the adapter moved them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from workbench.errors import WeightsError
from workbench.evaluation.generation import encode_prompt, evaluating
from workbench.models.loading import BaseModel, load_model
from workbench.tuning.lora import adapter_disabled, has_adapter

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
)
# Weights that are rounded back to the base's lose all that the adapter does: a share of 1. A
# trained adapter on SmolLM2 lost 0 % of it at 8 bits and 33 % at 4 (groups of 64).
LARGEST_LOSS = 0.5
# Where rounding moves the logits much further than the adapter, what is left of it drowns.
LARGEST_NOISE = 2.0


@dataclass(frozen=True)
class Drift:
    """Differences of logits: root mean squares over prompts, positions and the vocabulary.

    Each position's mean over the vocabulary is taken out first: softmax does not see it. `lost`
    is the part of the adapter's move a that the rounding's move e takes back: -e·a / a·a.
    """

    adapter: float | None  # adapter on against off; None where there is none
    rounding: float  # the export against the model that it was made of
    lost: float | None  # share of the adapter's effect; None where it has none

    @property
    def swallows(self) -> bool:
        """Whether rounding takes back or drowns what the adapter does."""
        if self.lost is None:
            return False
        # Numbers that are none are within no bound.
        kept = self.lost <= LARGEST_LOSS and self.rounding <= LARGEST_NOISE * self.adapter
        return not kept

    def __str__(self) -> str:
        rounding = f"quantisation moves the logits by {self.rounding:.3g} (root mean square)"
        if self.adapter is None:
            return f"{rounding}; there is no adapter to compare with"
        if self.lost is None:
            return f"{rounding}; the adapter does not move them at all"
        lost = f"{100 * max(self.lost, 0):.0f} % of what it does is lost"
        return f"{rounding}, the adapter by {self.adapter:.3g}, and {lost}"


def measure(base: BaseModel, exported: Path, prompts: Sequence[str]) -> Drift:
    """Load the export and compare it with the model that it was made of.

    Raises:
        WorkbenchError: the export does not load, or a prompt has no tokens.
    """
    tokens = [encode_prompt(base, prompt) for prompt in prompts]
    before = _logits(base, tokens)
    moved = _logits(load_model(exported), tokens) - before
    if not has_adapter(base.model):
        return Drift(None, _root_mean_square(moved), None)
    with adapter_disabled(base.model):
        effect = before - _logits(base, tokens)
    power = float(np.vdot(effect, effect))
    lost = -float(np.vdot(moved, effect)) / power if power else None
    return Drift(_root_mean_square(effect), _root_mean_square(moved), lost)


def require_adapter(drift: Drift, where: object) -> None:
    """Raise WeightsError if quantisation swallows the adapter."""
    if drift.swallows:
        raise WeightsError(
            f"quantisation swallows the adapter: {drift}",
            where=where,
            cure=f"Bounds are {100 * LARGEST_LOSS:.0f} % lost, and {LARGEST_NOISE:g} times the "
            "adapter's move. Use more bits or a smaller group_size, or write it unquantised; "
            "force=True writes it all the same.",
        )


def _logits(base: BaseModel, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Centred logits of every position of every prompt, one after the other."""
    with evaluating(base.model):
        found = [base.model(mx.array([tokens]))[0].astype(mx.float32) for tokens in prompts]
        centred = [logits - logits.mean(axis=-1, keepdims=True) for logits in found]  # (T, V)
        return np.array(mx.concatenate(centred)).ravel()


def _root_mean_square(difference: np.ndarray) -> float:
    return float(np.sqrt(np.square(difference).mean()))
