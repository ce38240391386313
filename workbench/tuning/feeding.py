"""Where a trainer's micro-batches come from: rows in memory, or a stream."""

from __future__ import annotations

from workbench.data.batches import BatchPlan, RowFeed
from workbench.data.datasets import Dataset
from workbench.data.stream_feed import StreamFeed
from workbench.data.streams import StreamDataset
from workbench.errors import ConfigError
from workbench.models.loading import BaseModel
from workbench.tuning.config import TrainConfig
from workbench.tuning.refusals import check_rows, row_check


def make_feed(data: Dataset, base: BaseModel, config: TrainConfig) -> RowFeed | StreamFeed:
    """What gives each step its micro-batches.

    Args:
        data: rows in memory, or a stream.
        base: the model that shall take them.
        config: sizes of batches, and the seed of the order of rows in memory.

    Raises:
        DataError: no rows, or one that the network cannot take; of a stream, of `valid` only.
        ConfigError: a stream without a number of steps.
    """
    check_rows(data, base)
    sizes = config.micro_batch_size, config.grad_accum_steps
    if not isinstance(data, StreamDataset):
        return RowFeed(data.train, BatchPlan(tuple(map(len, data.train)), *sizes, config.seed))
    if config.steps is None:
        raise ConfigError(
            f"a stream has no known number of rows, so {config.epochs} epochs are no number of "
            "steps",
            cure="Give TrainConfig(steps=…): N rows are N / (micro_batch_size × grad_accum_steps) "
            "steps a pass.",
        )
    return StreamFeed(data, *sizes, check=row_check(base))
