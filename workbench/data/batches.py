"""The order of rows, and micro-batches of nearly equal lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.data.examples import Example
from workbench.errors import DataError, check_whole

PAD_ID = 0  # padding is never a target and, being on the right, is seen by no earlier token


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to the longest of them."""

    tokens: np.ndarray  # (B, T) int32
    loss_mask: np.ndarray  # (B, T) bool: whether token t is a target
    rows: tuple[int, ...]  # row numbers in the data set
    sides: int = 1  # rows of tokens to a row of the data: 2 of pairs, whose chosen ones come first
    places: tuple[str, ...] = ()  # file and line of each row, for messages
    authority_weight: np.ndarray | None = None  # (B,) float64; None unless every row has one
    provenance_entropy: np.ndarray | None = None  # (B,) float64, bits; None unless every row has

    @property
    def num_tokens(self) -> int:
        """Number of supervised targets."""
        return int(self.loss_mask[:, 1:].sum())

    @property
    def weight(self) -> int:
        """What the sum of the batch's loss is divided by: its supervised targets, or its pairs."""
        return self.num_tokens if self.sides == 1 else len(self.tokens) // self.sides


def collate(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Pad the given rows of a data set into one batch; of pairs, all first sides come first."""
    by_side = list(zip(*(examples[row].sides for row in rows)))
    sequences = [example for side in by_side for example in side]
    length = max(map(len, sequences))
    tokens = np.full((len(sequences), length), PAD_ID, dtype=np.int32)
    loss_mask = np.zeros((len(sequences), length), dtype=bool)
    for place, example in enumerate(sequences):
        tokens[place, : len(example)] = example.tokens
        loss_mask[place, : len(example)] = example.loss_mask
    numbers, places = tuple(int(row) for row in rows), tuple(examples[row].where for row in rows)
    if len(by_side) > 1:  # what a pair teaches is a preference, not a document
        return Batch(tokens, loss_mask, numbers, len(by_side), places)
    weights = _column([example.authority_weight for example in sequences])
    entropies = _column([example.provenance_entropy for example in sequences])
    return Batch(tokens, loss_mask, numbers, 1, places, weights, entropies)


def _column(values: list[float | None]) -> np.ndarray | None:
    return None if None in values else np.array(values, dtype=np.float64)


@dataclass(frozen=True)
class BatchPlan:
    """Which rows each step trains: a pure function of (seed, step).

    Every row is used once an epoch. Rows of nearly equal length share a micro-batch; the order of
    rows of one length, and of the micro-batches, is shuffled anew each epoch. The last micro-batch
    of an epoch, and its last step, may be smaller.
    """

    lengths: tuple[int, ...]  # tokens of each row
    micro_batch_size: int  # rows
    grad_accum_steps: int = 1  # micro-batches a step
    seed: int = 0

    def __post_init__(self):
        for name in ("micro_batch_size", "grad_accum_steps"):
            check_whole(name, getattr(self, name), 1)
        if not self.lengths:
            raise DataError("the data set has no training rows")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in which every row is used once."""
        num_batches = -(-len(self.lengths) // self.micro_batch_size)
        return -(-num_batches // self.grad_accum_steps)

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """Row numbers of each micro-batch of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.grad_accum_steps
        return _epoch(self, epoch)[first : first + self.grad_accum_steps]


@dataclass(frozen=True)
class RowFeed:
    """Gives each step its micro-batches from rows in memory; the step's number is its place."""

    examples: Sequence[Example]
    plan: BatchPlan

    progress = None  # only a stream's is worth telling

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, counted from 0."""
        return [collate(self.examples, rows) for rows in self.plan.micro_batches(step)]

    def epoch(self, step: int) -> int:
        """The epoch, counted from 1, that a step belongs to."""
        return step // self.plan.steps_per_epoch + 1

    def state(self, steps_done: int) -> None:
        """Nothing: a checkpoint knows the number of steps."""

    def restore(self, state: object, steps_done: int, where: object = "") -> None:
        """Nothing is to be done."""

    def mark(self) -> None:
        """Nothing is to be kept."""

    def go_back(self, mark: None) -> None:
        """Nothing is to be done."""


@functools.lru_cache(maxsize=4)
def _epoch(plan: BatchPlan, epoch: int) -> list[np.ndarray]:
    random = np.random.default_rng([plan.seed, epoch])
    shuffled = random.permutation(len(plan.lengths))
    by_length = shuffled[np.argsort(np.array(plan.lengths)[shuffled], kind="stable")]
    starts = range(0, len(by_length), plan.micro_batch_size)
    batches = [by_length[start : start + plan.micro_batch_size] for start in starts]
    return [batches[place] for place in random.permutation(len(batches))]
