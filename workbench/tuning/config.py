"""How to train, and what each step reports."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.errors import ConfigError, RunError, SettingsWarning, check_number, check_whole
from workbench.tuning.schedules import SCHEDULES

WHOLE_NUMBERS = {  # field: smallest value
    "epochs": 1,
    "steps": 1,
    "micro_batch_size": 1,
    "grad_accum_steps": 1,
    "warmup_steps": 0,
    "decay_steps": 1,
    "valid_every": 0,
    "cache_limit_bytes": 0,
    "memory_limit_bytes": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "max_bad_steps": 0,
    "patience": 0,
    "reload_every": 0,
    "reload_above_bytes": 0,
    "prefix_cache_bytes": 0,
    "seed": 0,
}
MAY_BE_NONE = ("steps", "decay_steps", "cache_limit_bytes", "memory_limit_bytes")
NUMBERS = {  # field: smallest value
    "learning_rate": 0.0,
    "min_learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "adam_epsilon": 0.0,
    "lora_plus_ratio": 0.0,
    "decay_power": 0.0,
}
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor", "muon")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step is one optimizer update."""

    epochs: int = 1  # times that every row is used, if `steps` is not given
    steps: int | None = None  # optimizer updates
    micro_batch_size: int = 8  # rows that go through the network together
    grad_accum_steps: int = 1  # micro-batches a step
    learning_rate: float = 1e-4  # the largest
    min_learning_rate: float = 0.0  # at the end
    schedule: str = "cosine"  # or constant, linear, polynomial, wsd (see learning_rate_at)
    warmup_steps: int = 0  # optimizer updates
    warmup_from: float | None = None  # rate of the first update; None: the largest / warmup_steps
    decay_steps: int | None = None  # optimizer updates that come down; None: all; wsd: a tenth
    decay_power: float = 1.0  # of polynomial
    optimizer: str = "adamw"  # or adam, sgd, lion, adafactor, muon (see make_optimizer)
    max_grad_norm: float = 1.0  # global L2 norm; 0 turns clipping off
    weight_decay: float = 0.01  # adamw, lion, adafactor: decoupled; sgd, muon: L2; adam: none
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    bias_correction: bool = True  # of the first steps of adam and adamw
    lion_betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.9  # of sgd and muon
    lora_plus_ratio: float = 1.0  # learning rate of every lora_b, as a multiple (LoRA+)
    valid_every: int = 0  # steps between validations; 0: after the last step only
    cache_limit_bytes: int | None = None  # kept by MLX for reuse; None: default_cache_limit()
    memory_limit_bytes: int | None = None  # of the process; None: 95 % of what it can have; 0: none
    checkpoint_every: int = 50  # steps, if there is a run folder; 0: at start, stop and end only
    keep_checkpoints: int = 2  # newest ones; the best of the validations stays as well
    on_bad_step: str = "raise"  # or "skip": loss or gradients that are not finite
    max_bad_steps: int = 10  # that are skipped in all; the next one raises
    patience: int = 0  # validations without improvement before the run stops; 0: never
    reload_every: int = 0  # steps between two reloads of model and optimizer; 0: never
    reload_above_bytes: int = 0  # process memory that brings a reload about; 0: none does
    prefix_cache: bool | None = None  # keep what leaves the frozen layers; None: where it pays
    prefix_cache_bytes: int = 1_000_000_000  # that may be kept of it
    seed: int = 0  # of the order and of dropout
    grad_checkpoint: bool = False  # keep each layer's input only, and compute the layer again
    fused_loss: bool | None = None  # logits of some positions at a time; None: where possible
    shared_prompt: bool | None = None  # what all rows of a batch begin with once; None: likewise

    def __post_init__(self):
        for name, smallest in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in MAY_BE_NONE:
                check_whole(name, value, smallest)
        for name, smallest in NUMBERS.items():
            check_number(name, getattr(self, name), smallest)
        if self.min_learning_rate > self.learning_rate:
            floor, peak = self.min_learning_rate, self.learning_rate
            raise ConfigError(f"min_learning_rate {floor:g} is above learning_rate {peak:g}")
        if not self.lora_plus_ratio:
            raise ConfigError("lora_plus_ratio must be above 0, or no lora_b learns")
        if self.warmup_from is not None:
            check_number("warmup_from", self.warmup_from, 0)
        for name in ("grad_checkpoint", "bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False: {getattr(self, name)!r}")
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                what = f"unknown {name} {getattr(self, name)!r}"
                raise ConfigError(what, cure=f"Use one of {known}.")
        if self.on_bad_step not in ("raise", "skip"):
            raise ConfigError(f"on_bad_step must be 'raise' or 'skip', got {self.on_bad_step!r}")
        for name in ("prefix_cache", "fused_loss", "shared_prompt"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ConfigError(f"{name} must be True, False or None: {value!r}")
        if not _are_betas([self.momentum, self.momentum]):
            raise ConfigError(f"momentum must be in [0, 1), got {self.momentum!r}")
        for name in ("adam_betas", "lion_betas"):
            if not _are_betas(getattr(self, name)):
                got = getattr(self, name)
                raise ConfigError(f"{name} must be two numbers in [0, 1), got {got!r}")

    @classmethod
    def from_mlx_lm(cls, path: str | os.PathLike) -> TrainConfig:
        """The training part of a YAML of `mlx_lm.lora`; see `read_mlx_lm_yaml` for all of it.

        Warns:
            SettingsWarning: with its notes, of what cannot be the same.
        """
        from workbench.tuning.mlx_lm_yaml import read_mlx_lm_yaml  # which makes these

        run = read_mlx_lm_yaml(path)
        notes = "".join(f"\n- {note}" for note in run.notes)
        warnings.warn(f"{path}: taken from mlx-lm, but{notes}", SettingsWarning, stacklevel=2)
        return run.train


def _are_betas(betas: object) -> bool:
    return (
        isinstance(betas, tuple | list)
        and len(betas) == 2
        and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
    )


@dataclass(frozen=True)
class StepReport:
    """What one optimizer update did."""

    step: int  # counted from 1
    total_steps: int
    epoch: int  # counted from 1
    loss: float  # mean cross-entropy of the step's supervised targets, or its pairs' loss, in nats
    num_tokens: int  # supervised targets
    num_input_tokens: int  # tokens that went through the network, padding included
    learning_rate: float
    grad_norm: float  # before clipping
    clipped_grad_norm: float  # after it
    step_seconds: float  # without validation
    tokens_per_second: float  # input tokens
    active_bytes: int
    cache_bytes: int
    peak_bytes: int  # since the training began
    process_bytes: int | None  # None: not known
    available_bytes: int | None = None  # what the machine could still give without swapping
    valid_loss: float | None = None  # the same of the validation rows, where this step validated
    valid_seconds: float | None = None  # that it took
    skipped: bool = False  # loss or gradients were not finite: no update was made
    spike: bool = False  # a loss far above those of the steps before
    released_bytes: int | None = None  # process memory that a reload before this step gave back
    epoch_share: float | None = None  # of a stream's bytes that the epoch has used; else None
    extras: dict[str, float] | None = None  # means of what an objective measures beside its loss

    @classmethod
    def from_row(cls, row: Mapping[str, object], where: object = "") -> StepReport:
        """A report from a row of a run's metrics; names that it does not know are left out.

        Raises:
            RunError: the row lacks what a report needs, or holds what is no number.
        """
        known = {f.name: f for f in dataclasses.fields(cls) if f.name in row}
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        missing = sorted(needed - set(known))
        if missing:
            raise RunError(f"lacks {', '.join(missing)}: these are other metrics", where=where)
        lost = row.get("skipped") is True  # whose loss and gradients are not finite
        for name, field in known.items():
            if not _fits(row[name], str(field.type), lost or name == "valid_loss"):
                kind = "truth value" if field.type == "bool" else "number"
                raise RunError(f"{name} is {row[name]!r}, which is no {kind}", where=where)
        return cls(**{name: row[name] for name in known})

    def __str__(self) -> str:
        valid = "" if self.valid_loss is None else f"  valid {self.valid_loss:.4f}"
        held = "" if self.process_bytes is None else f"  {self.process_bytes / 1e9:.2f} GB"
        extras = "".join(f"  {name} {value:.3g}" for name, value in (self.extras or {}).items())
        if self.skipped:
            return f"step {self.step}/{self.total_steps}  skipped: loss {self.loss}"
        return (
            f"step {self.step}/{self.total_steps}  loss {self.loss:.4f}{valid}{extras}  "
            f"lr {self.learning_rate:.2e}  grad {self.grad_norm:.2f}  "
            f"{self.tokens_per_second:.0f} tokens/s{held}"
        )


def _fits(value: object, kind: str, may_be_nan: bool) -> bool:
    """Whether a value from a file may stand in a report's field of this annotation."""
    if value is None:
        return "None" in kind
    if kind.startswith("dict"):
        return isinstance(value, dict) and all(
            _fits(v, "float", may_be_nan) for v in value.values()
        )
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    if not isinstance(value, int | float) or not (may_be_nan or math.isfinite(value)):
        return False
    return "int" not in kind or value == int(value)
