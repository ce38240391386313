"""A model whose logits are free numbers: what the loss does to them shows what it trains.

The derivative of a cross-entropy with respect to the logits at one place is
weight · (softmax(logits) − onehot(target)) (Bishop 2006, Pattern Recognition and Machine Learning,
section 4.3.4). With random logits in the place of the model's own, one backward pass reads off
which positions are trained, against which token, and with which weight, whatever the loss's code.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.probes.training_checks.subject import Rows, Training, described

MAX_BYTES = 2**30  # of the free logits of one micro-batch
MAX_LAG = 2  # places by which a model may move its logits, and this is noticed
LAG_TOKENS = 8  # tokens of the row that shows it
TRAINED = 1e-6  # of the largest derivative: below is nothing
PLAIN = 1e-3  # departure from weight · (softmax − onehot) that is rounding


class UnreadableLossError(Exception):
    """The loss does not reach the model through its logits; says how it does."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What the loss trains in one micro-batch: n positions, each with a target and a weight.

    A position is that of the last token that the logits have seen.
    """

    rows: np.ndarray  # (n,) row of the batch
    positions: np.ndarray  # (n,)
    targets: np.ndarray  # (n,) token ids
    weights: np.ndarray  # (n,) of each target in the loss
    is_plain: bool  # whether the derivative is that of cross-entropy
    lag: int  # places by which the model itself moves its logits

    def trained(self, shape: tuple[int, int]) -> np.ndarray:
        """(B, T) bool: the tokens that are predicted, if every target is the next token."""
        found = np.zeros(shape, dtype=bool)
        inside = self.positions + 1 < shape[1]
        found[self.rows[inside], self.positions[inside] + 1] = True
        return found


class FreeLogits:
    """Stands in a model's place; its logits are those of `values`, by row and position.

    The model itself is called too, but never evaluated: its result has the right shape, and may
    be a tuple with more in it.
    """

    def __init__(self, model: nn.Module, rows: Rows, values: mx.array, lag: int):
        self._model, self._rows, self._values, self._lag = model, rows, values, lag
        self._margin = max(0, -lag)
        self.was_called, self.was_used = False, set()

    def __call__(self, tokens: mx.array, *args, **kwargs) -> object:
        return self._replaced(self._model(tokens, *args, **kwargs), tokens)

    def __getattr__(self, name: str) -> object:
        value = getattr(self._model, name)
        self.was_used.add(name)
        if name == "backbone" and callable(getattr(self._model, "head", None)):
            return lambda tokens, *args, **kwargs: self._replaced(
                value(tokens, *args, **kwargs), tokens
            )
        if name == "head" and "backbone" in self.was_used:
            return lambda hidden_states: hidden_states
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._model

    def __getitem__(self, key: str) -> object:
        self.was_used.add(key)
        return self._model[key]

    def _replaced(self, output: object, tokens: mx.array) -> object:
        self.was_called = True
        own = first_array(output)
        if own is None or own.ndim != 3:
            shape = getattr(own, "shape", type(output).__name__)
            raise UnreadableLossError(
                f"the model returned {shape} to the loss, not logits (B, T, V)"
            )
        rows, start = self._place(np.array(tokens))
        start += self._lag + self._margin
        free = self._values[rows, start : start + own.shape[1]]
        if isinstance(output, dict):
            return {**output, "logits": free}
        if not isinstance(output, tuple | list):
            return free
        make = getattr(type(output), "_make", type(output))  # a named tuple takes its fields apart
        return make([free, *output[1:]])

    def _place(self, tokens: np.ndarray) -> tuple[mx.array, int]:
        """Rows of the batch that these tokens are a part of, and the place where they begin."""
        of_batch = self._rows.tokens
        spare = of_batch.shape[1] - tokens.shape[-1]
        for start in range(spare + 1 if tokens.ndim == 2 else 0):
            window = of_batch[:, start : start + tokens.shape[1]]
            if window.shape == tokens.shape and (window == tokens).all():
                return mx.arange(len(tokens)), start
            rows = [np.flatnonzero((window == row).all(axis=1)) for row in tokens]
            if all(len(found) for found in rows):
                return mx.array([int(found[0]) for found in rows]), start
        raise UnreadableLossError("the loss feeds the model other tokens than the batch's")


def first_array(output: object) -> mx.array | None:
    """The logits in what a model returned: itself, the first of a tuple, or `logits` of a dict."""
    if isinstance(output, dict):
        output = output.get("logits")
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, mx.array) else None


def read_loss(training: Training, rows: Rows, seed: int = 0) -> Reading | None:
    """What the loss trains in a micro-batch; None if it does not use the model it is given.

    Raises:
        UnreadableLossError: the loss does not go through the model's logits.
    """
    width, lag = _output_width(training.model, rows), output_lag(training.model, rows)
    length = rows.tokens.shape[1] + abs(lag)
    if len(rows.tokens) * length * width * 4 > MAX_BYTES:
        raise UnreadableLossError(
            f"{len(rows.tokens)} × {length} × {width} logits are more than {MAX_BYTES >> 20} MiB; "
            "check a smaller batch"
        )
    values = mx.random.normal((len(rows.tokens), length, width), key=mx.random.key(seed))
    model = FreeLogits(training.model, rows, values, lag)

    def loss(values: mx.array) -> mx.array:
        model._values = values
        return training.loss(rows, model)

    try:
        gradient = mx.grad(loss)(values)
        mx.eval(gradient)
    except Exception as error:
        root = error.__cause__ or error
        text = str(root) if isinstance(root, UnreadableLossError) else described(root)
        raise UnreadableLossError(text) from error
    if not model.was_called:
        if not model.was_used:
            return None
        through = ", ".join(f".{name}" for name in sorted(model.was_used))
        raise UnreadableLossError(f"the loss reaches the model by {through}, past its logits")
    return _reading(gradient, values, lag, max(0, -lag))


def _reading(gradient: mx.array, values: mx.array, lag: int, margin: int) -> Reading:
    sizes = mx.abs(gradient)
    targets = sizes.argmax(axis=-1)  # |p_target − 1| is the largest entry, whatever the weight
    largest = np.array(sizes.max(axis=-1))
    if not np.isfinite(largest).all():
        row, place = np.argwhere(~np.isfinite(largest))[0]
        raise UnreadableLossError(f"its derivative by the logits at ({row}, {place}) is not finite")
    rows, places = np.nonzero(largest > TRAINED * largest.max(initial=0.0))
    if not len(rows):
        nothing = np.zeros(0, dtype=int)
        return Reading(nothing, nothing, nothing, np.zeros(0), True, lag)
    at = mx.array(rows), mx.array(places)
    chosen, slopes = targets[at], gradient[at]  # (n,), (n, V)
    softmax = mx.softmax(values[at], axis=-1)
    errors = softmax - (mx.arange(softmax.shape[-1]) == chosen[:, None])
    weights = mx.take_along_axis(slopes / errors, chosen[:, None], axis=-1)  # (n, 1)
    departure = (mx.abs(slopes - weights * errors).max(axis=-1) / mx.abs(weights[:, 0])).max()
    return Reading(
        rows,
        places - margin,
        np.array(chosen),
        np.array(weights[:, 0]),
        departure.item() <= PLAIN,
        lag,
    )


def _output_width(model: nn.Module, rows: Rows) -> int:
    logits = _called(model, mx.array(rows.tokens[:1, :-1], dtype=mx.int32))
    return logits.shape[-1]


def output_lag(model: nn.Module, rows: Rows) -> int:
    """Places by which the model moves its logits: output i has seen the token at i + lag.

    0 for a causal language model, and where the model's answers do not tell.
    """
    tokens = rows.tokens[0, :LAG_TOKENS]
    changed = [len(tokens) // 2, len(tokens) // 2 + 1]
    if changed[1] >= len(tokens) - 1:
        return 0
    batch = np.repeat(tokens[None], 3, axis=0)
    for row, place in enumerate(changed, start=1):
        batch[row, place] = next(t for t in (0, 1) if t != tokens[place])
    logits = np.array(_called(model, mx.array(batch, dtype=mx.int32)).astype(mx.float32))
    moved = np.abs(logits - logits[:1]).max(axis=-1) > 1e-4 * np.abs(logits).max(initial=0.0)
    lags = {p - int(moved[row].argmax()) for row, p in enumerate(changed, 1) if moved[row].any()}
    lag = lags.pop() if len(lags) == 1 else 0
    return lag if abs(lag) <= MAX_LAG and moved[1:].any(axis=1).all() else 0


def _called(model: nn.Module, tokens: mx.array) -> mx.array:
    try:
        logits = first_array(model(tokens))
        shape = None if logits is None else logits.shape
        if shape is None or len(shape) != 3:
            raise UnreadableLossError(
                f"the model returned {shape} for tokens, not logits (B, T, V)"
            )
        return logits
    except UnreadableLossError:
        raise
    except Exception as error:
        raise UnreadableLossError(f"the model raised {described(error)}") from error
