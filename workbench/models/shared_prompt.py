"""Rows that begin alike as one sequence: the tokens that they share once, then the rest of each.

With causal attention, what a network makes of a token does not depend on the tokens after it. A
system prompt that all rows of a batch begin with need be computed only once; each row's own tokens
attend to it and to each other. All but attention treats positions one by one, so that a packed
batch (1, N, D) goes through a network like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

WORTHWHILE_SHARE = 1 / 16  # of a batch's positions that must fall away: taking apart costs time


@dataclass(frozen=True)
class SharedPrompt:
    """Layout of a packed batch: P shared positions, then T - P of each of the B rows."""

    length: int  # P, less than T
    rows: int  # B

    def pack(self, x: mx.array) -> mx.array:
        """(B, T, ...) → (1, P + B · (T - P), ...)."""
        return self.join(x[:1, : self.length], x[:, self.length :])

    def join(self, shared: mx.array, own: mx.array) -> mx.array:
        """(1, P, ...) and (B, T - P, ...) → (1, P + B · (T - P), ...)."""
        return mx.concatenate([shared, own.reshape(1, -1, *own.shape[2:])], axis=1)

    def split(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(1, P + B · (T - P), ...) → (1, P, ...) and (B, T - P, ...)."""
        own = x[:, self.length :]
        return x[:, : self.length], own.reshape(self.rows, -1, *x.shape[2:])

    def unpack(self, x: mx.array) -> mx.array:
        """(1, P + B · (T - P), ...) → (B, T, ...)."""
        shared, own = self.split(x)
        shared = mx.broadcast_to(shared, (self.rows, *shared.shape[1:]))
        return mx.concatenate([shared, own], axis=1)

    def places(self, places: np.ndarray, length: int) -> np.ndarray:
        """Places among the B · T positions of a batch of length T → among the packed ones."""
        row, at = np.divmod(places, length)
        own = self.length + row * (length - self.length) + at - self.length
        return np.where(at < self.length, at, own)


def find_shared_prompt(inputs: np.ndarray) -> SharedPrompt | None:
    """What the rows of inputs (B, T) begin with; None where it is too little to be worth it."""
    rows = len(inputs)
    differs = (inputs != inputs[0]).any(axis=0)
    differs[-1] = True  # each row keeps a position of its own
    shared = int(np.argmax(differs))
    if (rows - 1) * shared < WORTHWHILE_SHARE * inputs.size:
        return None
    return SharedPrompt(shared, rows)
