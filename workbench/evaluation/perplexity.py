"""Perplexity of a split: how surprised a model is by text, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.data.datasets import SPLITS, Dataset
from workbench.data.examples import Example
from workbench.errors import ConfigError, DataError, check_whole
from workbench.evaluation.generation import room
from workbench.evaluation.intervals import Z
from workbench.evaluation.likelihood import score_rows
from workbench.models.loading import BaseModel, require_base


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean cross-entropy over supervised targets."""

    loss: float  # mean cross-entropy, nats a token
    standard_error: float | None  # of `loss`, nats a token; None of a single row
    num_tokens: int  # supervised targets
    num_rows: int

    @property
    def value(self) -> float:
        """The perplexity."""
        return _exp(self.loss)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The perplexity at both ends of the loss's 95 % interval; None of a single row."""
        if self.standard_error is None:
            return None
        margin = Z * self.standard_error
        return _exp(self.loss - margin), _exp(self.loss + margin)

    def __str__(self) -> str:
        ends = self.interval
        interval = f"95 %: {ends[0]:.3g} to {ends[1]:.3g}; " if ends else ""
        return f"{self.value:.3g} ({interval}{self.num_rows} rows, {self.num_tokens} tokens)"


def perplexity(
    base: BaseModel,
    data: Dataset | Sequence[Example],
    split: str = "valid",
    *,
    batch_size: int = 16,
    max_positions: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of a data set's split, or of tokenised rows.

    The loss is `losses.mean_loss`; its standard error lets tokens of a row depend on one another.

    Args:
        base: a loaded model.
        data: from `load_dataset`; or examples, and `split` is not looked at.
        split: train, valid or test.
        batch_size: rows that go through the network together, at most.
        max_positions: tokens that the model reads at once; default all that it has. A longer row
            is read in windows, each of which scores what the one before did not.
        stride: tokens from one window to the next, so that a target has at least
            `max_positions - stride` tokens before it; default half of `max_positions`.

    Raises:
        DataError: the split is empty, or has ids that the model does not know.
        ConfigError: a setting is out of range, or base is no BaseModel.
        EvaluationError: the network gives NaN.
    """
    require_base(base)
    examples = _rows(data, split)
    longest, stride = _window(room(base), max_positions, stride)
    parts = [(row, w) for row, e in enumerate(examples) for w in windows(e, longest, stride)]
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    scores = score_rows(base, [window for _, window in parts], batch_size)
    for (row, _), score in zip(parts, scores):
        sums[row] -= score.log_probs.sum()
        counts[row] += len(score.log_probs)
    if not counts.sum():
        raise DataError("has no supervised target to score", where=split)
    return _summary(sums, counts)


def windows(example: Example, longest: int, stride: int) -> list[Example]:
    """A row in pieces that a model with `longest` positions can read; each target stands in one.

    The last token of a piece is only a target, so that a piece has up to `longest` + 1 tokens.
    Pieces without a target are left out.
    """
    pieces, scored, end = [], 1, min(len(example), longest + 1)
    while scored < len(example):
        begin = max(0, end - longest - 1)
        mask = example.loss_mask[begin:end].copy()
        mask[: scored - begin] = False
        if mask.any():
            pieces.append(Example(example.tokens[begin:end], mask, example.where))
        scored, end = end, min(len(example), end + stride)
    return pieces


def _rows(data: Dataset | Sequence[Example], split: str) -> Sequence[Example]:
    if isinstance(data, Dataset):
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} is unknown", cure=f"Use one of {SPLITS}.")
        there = [name for name in SPLITS if getattr(data, name)]
        if split not in there:
            raise DataError(
                f"data set {data.name!r} has no rows in its split {split!r}",
                cure=f"It has {', '.join(there) or 'none at all'}.",
            )
        data = getattr(data, split)
    if not len(data) or not all(isinstance(row, Example) for row in data):
        raise DataError(
            "perplexity needs tokenised rows",
            cure="Give what load_dataset returns, or a list of its examples.",
        )
    return data


def _window(positions: int, max_positions: int | None, stride: int | None) -> tuple[int, int]:
    """Length and stride of the windows, in tokens."""
    longest = positions
    if max_positions is not None:
        check_whole("max_positions", max_positions, 2)
        longest = min(longest, max_positions)
    stride = longest // 2 if stride is None else stride
    check_whole("stride", stride, 1)
    if stride > longest:
        raise ConfigError(f"stride {stride} exceeds the window of {longest} tokens")
    return longest, stride


def _summary(sums: np.ndarray, counts: np.ndarray) -> Perplexity:
    """The standard error of a ratio of sums over R rows (Cochran 1977, Sampling Techniques, 6.3).

    sqrt(R / (R - 1) · Σ (sum_r - loss · n_r)²) / N: row r has the cross-entropy sum_r over its n_r
    targets, N in all.
    """
    num_tokens = int(counts.sum())
    loss = float(sums.sum() / num_tokens)
    rows, error = int((counts > 0).sum()), None
    if rows > 1:
        squares = float(((sums - loss * counts) ** 2).sum())
        error = math.sqrt(rows / (rows - 1) * squares) / num_tokens
    return Perplexity(loss, error, num_tokens, rows)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
