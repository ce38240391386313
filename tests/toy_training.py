"""Toy trainers, and how two of them are compared."""

from __future__ import annotations

import dataclasses
import signal

import numpy as np
from mlx.utils import tree_flatten

from tests.toy import toy_base, toy_dataset
from workbench.probes.parameters import fingerprint
from workbench.tuning.config import StepReport, TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import supervised_loss
from workbench.tuning.trainer import Trainer

RAGGED = [7, 30, 12, 9, 21, 15, 5, 18]  # tokens a row
MACHINE = {"step_seconds", "tokens_per_second", "active_bytes", "cache_bytes", "peak_bytes"}
MACHINE |= {"process_bytes", "available_bytes", "valid_seconds"}


def toy_trainer(
    lengths=RAGGED,
    *,
    valid=(),
    dropout=0.0,
    full=False,
    data=None,
    adapter=None,
    network=None,
    **settings,
) -> Trainer:
    """A trainer on a fresh toy model; its adapter's or, with `full`, all parameters train.

    `adapter` and `network` hold settings of the adapter and of the toy model that are others.
    """
    base, kept = (
        toy_base(**(network or {})),
        {k: settings.pop(k) for k in ("run_dir", "loss_fn", "allow_changes") if k in settings},
    )
    if not full:
        add_lora(base.model, LoRAConfig(**{"rank": 4, "dropout": dropout, **(adapter or {})}))
    data = data or toy_dataset(lengths, valid)
    config = TrainConfig(**{"micro_batch_size": 4, "learning_rate": 1e-2, **settings})
    return Trainer(base, data, config, **kept)


def trained(trainer: Trainer) -> dict[str, np.ndarray]:
    """Named copies of what trains."""
    return {name: np.array(a) for name, a in tree_flatten(trainer.model.trainable_parameters())}


def state_of(trainer: Trainer) -> tuple[dict, dict]:
    """Fingerprints of parameters and optimizer state."""
    flat = tree_flatten(trainer.optimizer.state)
    return fingerprint(trainer.model), {name: np.array(array).tobytes() for name, array in flat}


def computed(report: StepReport) -> dict[str, object]:
    """A report without what the machine adds."""
    return {k: v for k, v in dataclasses.asdict(report).items() if k not in MACHINE}


class FailAt:
    """A loss function that does something at its n-th call, counted from 1."""

    def __init__(self, call, action):
        self.call, self.action, self.calls = call, action, 0

    def __call__(self, model, batch):
        self.calls += 1
        loss = supervised_loss(model, batch)
        return self.action(loss) if self.calls == self.call else loss


def interrupt(loss):
    """Ctrl-C, then the loss as it was."""
    signal.raise_signal(signal.SIGINT)
    return loss


def fail(loss):
    """Raise."""
    raise RuntimeError("planted")
