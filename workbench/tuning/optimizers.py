"""From a configuration to an optimizer."""

from __future__ import annotations

import mlx.optimizers as optim

from workbench.tuning.blocks import Blockwise
from workbench.tuning.config import TrainConfig


class BlockwiseAdamW(Blockwise, optim.AdamW):
    """MLX's AdamW, in blocks."""


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """AdamW as published (Loshchilov and Hutter 2019), with the correction of its first steps."""
    return BlockwiseAdamW(
        learning_rate=0.0,  # set anew at every step
        betas=list(config.adam_betas),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        bias_correction=True,
    )
