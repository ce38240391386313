"""A step's rows parted between processes that train together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from workbench.data.batches import Batch


def share_of(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """What one of `size` ranks computes of a step's micro-batches; every row is somebody's.

    Whole micro-batches, dealt out by their size, if they come out even; else rows of each in turn.
    The rows of a micro-batch are sorted by length, so that all have alike work. Of a small last
    step a rank may get nothing.
    """
    if size == 1:
        return list(batches)
    if len(batches) % size == 0:
        by_size = sorted(batches, key=lambda batch: batch.tokens.size, reverse=True)
        turns = range(len(batches) // size)  # to and fro: who had the largest gets the smallest
        return [by_size[i * size + (size - 1 - rank if i % 2 else rank)] for i in turns]
    shares, passed = [], 0
    for batch in batches:
        count = len(batch.rows)
        rows = [row for row in range(count) if (passed + row) % size == rank]
        passed += count
        if rows:
            shares.append(take_rows(batch, rows))
    return shares


def take_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, by their places in it; of pairs, both sides.

    They stay as wide as the batch.
    """
    count = len(batch.rows)
    places = np.array([side * count + row for side in range(batch.sides) for row in rows])
    columns = ("authority_weight", "provenance_entropy")
    given = {name: getattr(batch, name) for name in columns}
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[places],
        loss_mask=batch.loss_mask[places],
        rows=tuple(batch.rows[row] for row in rows),
        places=tuple(batch.places[row] for row in rows) if batch.places else (),
        **{name: None if column is None else column[places] for name, column in given.items()},
    )
