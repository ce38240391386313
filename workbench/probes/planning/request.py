"""What is to be planned: checked settings, and the phases that they lead to."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from workbench.blocks import UPDATE_NUMBERS
from workbench.errors import ConfigError, check_number, check_whole
from workbench.probes.planning.arrays import FLOAT32
from workbench.probes.planning.dimensions import Model
from workbench.probes.planning.machine import Machine
from workbench.probes.planning.network import Network, Work
from workbench.probes.planning.optimizers import OPTIMIZERS, state_bytes
from workbench.probes.planning.parameters import MODES, Adapted, Parameters
from workbench.probes.planning.schedule import Moment
from workbench.probes.planning.steps import (
    GRADIENTS,
    OPTIMIZER,
    backward_moment,
    load_moment,
    update_moment,
)

ALL_LINEAR = "all-linear"
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class AdapterSettings:
    """The fields of a LoRAConfig that cost memory, with its defaults."""

    rank: int = 8
    target_modules: str | Sequence[str] = ALL_LINEAR
    num_layers: int | None = None  # the last N; None for all
    dropout: float = 0.0


@dataclass(frozen=True)
class Request:
    """Settings of a run. Bytes and counts as in `LoRAConfig` and `TrainConfig`."""

    model: Model
    mode: str
    rank: int
    target_modules: tuple[str, ...]
    num_layers: int | None
    dropout: float
    micro_batch_size: int
    length: int  # positions a row that the network sees
    supervised: float  # share of positions with a target
    grad_accum_steps: int
    grad_checkpoint: bool
    fused_loss: bool | None
    optimizer: str
    dtype: str  # of the base weights
    bits: int | None  # of quantised base weights
    gpu: bool
    linux: bool = True

    def __post_init__(self):
        for name in ("rank", "micro_batch_size", "length", "grad_accum_steps"):
            check_whole(name, getattr(self, name), 1)
        check_number("dropout", self.dropout, 0)
        check_number("supervised", self.supervised, 0)
        if not 0 < self.supervised <= 1:
            raise ConfigError(f"supervised must be a share in (0, 1], got {self.supervised!r}")
        if self.mode not in MODES:
            raise ConfigError(f"unknown mode {self.mode!r}", cure=f"Use one of {MODES}.")
        if self.optimizer not in OPTIMIZERS:
            what = f"unknown optimizer {self.optimizer!r}"
            raise ConfigError(what, cure=f"Use one of {OPTIMIZERS}.")
        if self.dtype not in WIDTHS:
            raise ConfigError(
                f"unknown dtype {self.dtype!r}", cure=f"Use one of {', '.join(WIDTHS)}."
            )
        if self.fused_loss not in (True, False, None):
            raise ConfigError(f"fused_loss must be True, False or None: {self.fused_loss!r}")
        self._check_bits()
        self._check_against_model()

    def _check_bits(self) -> None:
        if self.bits is None:
            return
        if self.bits not in BITS:
            raise ConfigError(f"bits must be one of {BITS} or None, got {self.bits!r}")
        if self.mode != "lora":
            raise ConfigError(
                f"mode {self.mode!r} trains weights, and {self.bits}-bit weights cannot be trained",
                cure="Use mode='lora', or bits=None.",
            )

    def _check_against_model(self) -> None:
        config = self.model.config
        if self.length > config.max_position_embeddings:
            raise ConfigError(
                f"length {self.length} exceeds the model's {config.max_position_embeddings} "
                "positions",
                cure="Plan shorter rows.",
            )
        if self.num_layers is not None:
            check_whole("num_layers", self.num_layers, 1)
            if self.num_layers > config.num_hidden_layers:
                raise ConfigError(
                    f"num_layers {self.num_layers} exceeds the model's "
                    f"{config.num_hidden_layers} layers"
                )
        self.adapted_modules  # noqa: B018 - raises for a name that matches nothing

    def __str__(self) -> str:
        how = f"{self.mode} rank {self.rank}" if self.mode == "lora" else self.mode
        some = self.mode == "lora" and self.num_layers
        layers = f" on the last {self.num_layers} of the layers" if some else ""
        width = f"{self.bits} bit" if self.bits else self.dtype
        again = ", checkpointed" if self.grad_checkpoint else ""
        again += f", {self.optimizer}" if self.optimizer != OPTIMIZERS[0] else ""
        whole = self.model.parted and not self.fuses_loss
        again += ", logits not in chunks" if whole else ""
        rows = f"{self.micro_batch_size} × {self.length} tokens"
        times = f" × {self.grad_accum_steps}" if self.grad_accum_steps > 1 else ""
        return f"{how}{layers}, {rows}{times}, {width}{again}"

    @property
    def adapted_modules(self) -> frozenset[str]:
        """Linear layers inside a layer that get an adapter.

        Raises:
            ConfigError: a name matches nothing; lists what there is.
        """
        names, wanted = list(self.model.linear_shapes), self.target_modules
        if wanted == (ALL_LINEAR,):
            return frozenset(names)

        def matches(name: str, target: str) -> bool:
            return name == target or name.endswith(f".{target}")

        unmatched = [t for t in wanted if not any(matches(name, t) for name in names)]
        if unmatched or not wanted:
            there = ", ".join(name.rpartition(".")[2] for name in names)
            raise ConfigError(
                f"target_modules {unmatched} match nothing",
                cure=f"This model has {there}; or use {ALL_LINEAR!r}.",
            )
        return frozenset(name for name in names if any(matches(name, t) for t in wanted))

    @property
    def fuses_loss(self) -> bool:
        """Whether logits are computed in chunks, as the trainer decides it."""
        return self.model.parted and self.fused_loss is not False

    @property
    def fast_forms(self) -> bool:
        """Whether our networks use their forms for MLX's CPU backend on Linux."""
        wide = WIDTHS[self.dtype] == FLOAT32
        return self.model.parted and wide and self.linux and not self.gpu

    @property
    def work(self) -> Work:
        """One micro-batch."""
        positions = self.micro_batch_size * self.length
        targets = self.micro_batch_size * max(1, math.ceil(self.length * self.supervised - 1e-9))
        supervised = targets if self.model.parted else positions
        return Work(
            self.micro_batch_size, self.length, supervised, self.grad_checkpoint, self.fuses_loss
        )

    def parameters(self) -> Parameters:
        """The weights, of which some train."""
        adapted = None
        if self.mode == "lora":
            layers = self.model.config.num_hidden_layers
            first = layers - (self.num_layers or layers)
            adapted = Adapted(self.rank, self.adapted_modules, first)
        itemsize = WIDTHS[self.dtype]
        return Parameters(self.model, self.mode, adapted, itemsize, self.bits)


def make_request(
    model: Model, lora: object, dtype: mx.Dtype | str | None, machine: Machine, **settings: object
) -> Request:
    """A request from the settings as users give them."""
    lora = lora or AdapterSettings()
    missing = [f for f in ("rank", "target_modules", "num_layers") if not hasattr(lora, f)]
    if missing:
        raise ConfigError(
            f"lora has no {missing[0]}", cure="Give a wb.LoRAConfig, or None for its defaults."
        )
    targets = lora.target_modules
    return Request(
        model=model,
        rank=lora.rank,
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        num_layers=lora.num_layers,
        dropout=getattr(lora, "dropout", 0.0),
        dtype=_dtype_name(dtype, model, machine.gpu),
        gpu=machine.gpu,
        linux=machine.linux,
        **settings,
    )


def _dtype_name(dtype: mx.Dtype | str | None, model: Model, gpu: bool) -> str:
    if dtype is not None:
        return str(dtype).removeprefix("mlx.core.")
    if not gpu:
        return "float32"  # backend.default_dtype()
    return model.file_dtype if model.file_dtype in WIDTHS else "bfloat16"


@functools.lru_cache(maxsize=512)
def phases(request: Request) -> Mapping[str, Moment]:
    """The fullest moment of each phase of a run, by name, in the order of their coming."""
    held, parameters = held_bytes(request), request.parameters()
    network = Network(parameters, request.dropout, request.gpu, request.fast_forms)
    load, update = _whatever_the_batch(_any_batch(request))
    work, accumulates = request.work, request.grad_accum_steps > 1
    return {
        "load": load,
        "forward and backward": backward_moment(network, work, held, accumulates),
        "update": update,
    }


def held_bytes(request: Request) -> Mapping[str, int]:
    """Bytes by part that a run holds between its steps: no peak is below their sum."""
    return _held(_any_batch(request))


@functools.lru_cache(maxsize=512)
def _held(request: Request) -> Mapping[str, int]:
    parameters = request.parameters()
    return {**parameters.held, OPTIMIZER: state_bytes(request.optimizer, parameters)}


@functools.lru_cache(maxsize=512)
def _whatever_the_batch(request: Request) -> tuple[Moment, Moment]:
    """The moments of load and update, which no batch has to do with."""
    parameters = request.parameters()
    load = load_moment(parameters, WIDTHS.get(request.model.file_dtype or "", 2))
    held = {**held_bytes(request), GRADIENTS: parameters.trainable_bytes}
    limit = UPDATE_NUMBERS["gpu" if request.gpu else "cpu"]
    return load, update_moment(parameters, request.optimizer, held, limit)


def _any_batch(request: Request) -> Request:
    return dataclasses.replace(
        request,
        micro_batch_size=1,
        length=1,
        supervised=1.0,
        grad_accum_steps=1,
        grad_checkpoint=False,
        fused_loss=None,
    )
