"""The training under test: its batches, read and verified, and its loss, called safely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from workbench.errors import ConfigError, DataError
from workbench.models.loading import embedding_rows

MODES = ("lora", "head", "full", "frozen")


class UserCodeError(Exception):
    """The loss, the step or the model under test raised, or returned something else."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A micro-batch, as the checks read it."""

    given: object  # what the loss function gets
    tokens: np.ndarray  # (B, T) int64
    loss_mask: np.ndarray  # (B, T) bool: whether token t is a target

    @property
    def expected(self) -> np.ndarray:
        """(B, T) bool, the hand rule: loss_mask[:, 1:]; nothing predicts a row's first token."""
        targets = self.loss_mask.copy()
        targets[:, 0] = False
        return targets

    @property
    def num_tokens(self) -> int:
        """Number of supervised targets."""
        return int(self.expected.sum())

    @property
    def padding(self) -> np.ndarray:
        """(B, T) bool: after a row's last target, the end of the row that repeats one id.

        Where rows end on different ids, the id of the longest such end is the padding.
        """
        found, ends = np.zeros(self.tokens.shape, dtype=bool), {}
        for row, (tokens, targets) in enumerate(zip(self.tokens, self.loss_mask)):
            free = len(targets) - np.flatnonzero(targets)[-1] - 1 if targets.any() else len(targets)
            same = np.flatnonzero(tokens[::-1] != tokens[-1])
            ends[row] = min(free, same[0] if len(same) else len(tokens))
        longest = max(ends, key=ends.get)
        for row, length in ends.items():
            if length and self.tokens[row, -1] == self.tokens[longest, -1]:
                found[row, -length:] = True
        return found


@dataclass(frozen=True, eq=False)
class Training:
    """A training under test."""

    model: nn.Module
    loss_fn: Callable
    given: object  # what `step` gets: one batch, or several micro-batches
    batches: list[Rows]
    mode: str | None = None
    step: Callable | None = None
    optimizer: object = None
    gradients: Callable | None = None
    terms: Mapping[str, Callable] = field(default_factory=dict)

    @property
    def trainable(self) -> dict[str, mx.array]:
        """Parameters that are not frozen, by name."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def loss(self, rows: Rows, model: object = None) -> mx.array:
        """The loss of a micro-batch, a scalar, of this model or of one in its place.

        Raises:
            UserCodeError: the loss function raised, or returned no scalar.
        """
        model = self.model if model is None else model
        return scalar_of("loss_fn", self.loss_fn, model, rows.given)


def scalar_of(name: str, function: Callable, *args) -> mx.array:
    """The scalar that a function returns; of a tuple, its first item.

    Raises:
        UserCodeError: it raised, or returned something else.
    """
    try:
        value = function(*args)
    except Exception as error:
        raise UserCodeError(f"{name} raised {described(error)}") from error
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, mx.array):
        raise UserCodeError(f"{name} returned {type(value).__name__}, not a scalar array")
    if value.ndim:
        raise UserCodeError(f"{name} returned an array of shape {value.shape}, not a scalar")
    return value


def described(error: Exception) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shown(names: Sequence[str], count: int = 3) -> str:
    """The first few names of a list."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def read_batches(batch: object, model: nn.Module) -> list[Rows]:
    """The micro-batches in what the user gave.

    Raises:
        DataError: there is none, one has no target, the shapes do not fit, or a token id is
            outside the vocabulary (which MLX would read out of bounds, in silence).
    """
    several = isinstance(batch, list | tuple) and not hasattr(batch, "tokens")
    given = list(batch) if several else [batch]
    if not given:
        raise DataError("there is no batch", cure="Give one batch, or a list of micro-batches.")
    names = [f"micro-batch {number}" if several else "batch" for number in range(len(given))]
    return [_read(item, name, model) for item, name in zip(given, names)]


def _read(batch: object, name: str, model: nn.Module) -> Rows:
    if not hasattr(batch, "tokens") or not hasattr(batch, "loss_mask"):
        raise DataError(
            f"a {type(batch).__name__} has no .tokens and .loss_mask",
            where=name,
            cure="Give an object with tokens (B, T) and loss_mask (B, T).",
        )
    try:
        tokens, mask = np.array(batch.tokens), np.array(batch.loss_mask)
    except Exception as error:
        what = f"tokens or loss_mask are no arrays ({described(error)})"
        raise DataError(what, where=name) from error
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise DataError(
            f"tokens {tokens.shape} and loss_mask {mask.shape} must both be (B, T)", where=name
        )
    if not len(tokens) or tokens.shape[1] < 2:
        raise DataError(f"tokens {tokens.shape} leave nothing to predict", where=name)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"tokens must be whole numbers, got {tokens.dtype}", where=name)
    if not np.isin(mask, (0, 1)).all():
        raise DataError("loss_mask must hold True and False, or 0 and 1", where=name)
    vocab_size = embedding_rows(model, _config(model)) or np.inf
    outside = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(outside):
        row, place = outside[0]
        raise DataError(
            f"token id {tokens[row, place]} is outside the vocabulary of {vocab_size}",
            where=f"{name}, row {row}, position {place}",
            cure="Tokenise the data with this model's own tokenizer.",
        )
    rows = Rows(batch, tokens.astype(np.int64), mask.astype(bool))
    if not rows.num_tokens:
        raise DataError("has no target", where=name, cure="Its loss_mask[:, 1:] is all False.")
    return rows


def _config(model: nn.Module) -> object:
    return getattr(model, "config", None) or getattr(model, "args", None)


def read_training(model: object, loss_fn: object, batch: object, **given: object) -> Training:
    """What is to be checked, verified.

    Raises:
        ConfigError: an argument is not what it should be.
        DataError: see `read_batches`.
    """
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)
        cure = "Pass its .model." if inner else "Pass the network."
        raise ConfigError(f"model must be an mlx.nn.Module, got {type(model).__name__}", cure=cure)
    callables = {"loss_fn": loss_fn, "step": given["step"], "gradients": given["gradients"]}
    callables |= {f"term {name!r}": term for name, term in (given["terms"] or {}).items()}
    for name, function in callables.items():
        if not callable(function) and (function is not None or name == "loss_fn"):
            raise ConfigError(f"{name} must be a function, got {type(function).__name__}")
    if given["mode"] is not None and given["mode"] not in MODES:
        raise ConfigError(f"unknown mode {given['mode']!r}", cure=f"Use one of {MODES}, or None.")
    given["terms"] = dict(given["terms"] or {})
    return Training(model, loss_fn, batch, read_batches(batch, model), **given)
