"""LoRA adapters: freeze the network, then attach (Hu et al. 2021, LoRA, section 4.1)."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from workbench.errors import ConfigError, check_kind, check_number, check_seed, check_whole
from workbench.models.structure import find_layers, module_at
from workbench.tuning.lora_layers import DoRALinear, LoRALinear

ALL_LINEAR = "all-linear"
LARGEST_RANK = 1 << 16


@dataclass(frozen=True)
class LoRAConfig:
    """Size and place of a LoRA adapter."""

    rank: int = 8  # columns of lora_a, rows of lora_b
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # probability, on the adapter's input only
    target_modules: str | Sequence[str] = ALL_LINEAR  # names such as "q_proj" or "self_attn.q_proj"
    num_layers: int | None = None  # the last N layers; None for all
    seed: int = 0  # of lora_a
    use_rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023, rsLoRA)
    use_dora: bool = False  # a trained length for each row of the weight (`DoRALinear`)

    def __post_init__(self):
        check_whole("rank", self.rank, 1, LARGEST_RANK)
        check_seed("seed", self.seed)
        check_number("alpha", self.alpha, 0)
        check_number("dropout", self.dropout, 0)
        if self.alpha == 0:
            raise ConfigError("alpha must be above 0, or the adapter has no effect")
        if self.dropout >= 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.num_layers is not None:
            check_whole("num_layers", self.num_layers, 1)
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False: {getattr(self, name)!r}")
        names = self.target_modules
        if not names or not isinstance(names, str | Sequence):
            raise ConfigError(
                f"target_modules must name modules, got {names!r}",
                cure=f"Use {ALL_LINEAR!r} or a list of names.",
            )

    @property
    def scale(self) -> float:
        """Factor on the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def kind(self) -> str:
        """The method's name."""
        return ("rs" if self.use_rslora else "") + ("DoRA" if self.use_dora else "LoRA")


@dataclass(frozen=True, repr=False)
class Adapter:
    """What `add_lora` attached."""

    config: LoRAConfig
    module_names: tuple[str, ...]  # paths of the adapted modules
    trainable: int  # numbers that training may change
    total: int  # numbers in the network, the adapter included
    expert_names: tuple[str, ...] = ()  # paths of stacked experts, which stay as they are

    @property
    def percent(self) -> float:
        """Trainable share of all numbers, in percent."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        experts = len(self.expert_names)
        return (
            f"{self.config.kind} rank {self.config.rank}, scale {self.config.scale:g} on "
            f"{len(self.module_names)} modules: {self.trainable:,} of {self.total:,} "
            f"numbers train ({self.percent:.2f} %)"
            + (f"; {experts} stacks of experts stay frozen" if experts else "")
        )

    __repr__ = __str__


def add_lora(model: nn.Module, config: LoRAConfig | None = None) -> Adapter:
    """Freeze the network, then attach an adapter to its linear layers.

    Experts that lie in one stack of matrices (mlx-lm's SwitchLinear) are no linear layers: they
    stay frozen, and the result names them; their router and all else is adapted.

    An adapter that is already there is removed first, so that a notebook cell can run twice.

    Raises:
        ConfigError: no network or configuration, a target that matches nothing, or num_layers
            beyond the layers; the network is then left as it was.
    """
    check_kind("model", model, nn.Module, "Give a network, such as base.model.")
    config = LoRAConfig() if config is None else config
    check_kind("config", config, LoRAConfig, "Such as wb.LoRAConfig(rank=8, alpha=16).")
    chosen = find_targets(model, config)
    remove_lora(model)
    model.freeze()
    root, kind = mx.random.key(config.seed), DoRALinear if config.use_dora else LoRALinear
    adapted = [
        (path, kind(module_at(model, path), config, _key_for(root, path))) for path in chosen
    ]
    model.update_modules(tree_unflatten(adapted))
    model.train(model.training)  # a new module would start with its dropout on
    mx.eval(model.trainable_parameters())
    return Adapter(config, tuple(chosen), *count_parameters(model), expert_names(model))


def expert_names(model: nn.Module) -> tuple[str, ...]:
    """Paths of mlx-lm's linear layers that hold a matrix for each expert."""
    named = model.named_modules()
    return tuple(sorted(p for p, m in named if hasattr(m, "num_experts") and "weight" in m))


def remove_lora(model: nn.Module) -> int:
    """Put the plain layers back, without the adapter's update; returns how many there were."""
    wrapped = [(path, m.linear) for path, m in model.named_modules() if isinstance(m, LoRALinear)]
    model.update_modules(tree_unflatten(wrapped))
    return len(wrapped)


def has_adapter(model: nn.Module) -> bool:
    """Whether a network has adapted layers."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The network as it was without its adapter, for the length of a `with` block."""
    adapted = [module for _, module in model.named_modules() if isinstance(module, LoRALinear)]
    scales = [module.scale for module in adapted]
    for module in adapted:
        module.scale = 0.0
    try:
        yield
    finally:
        for module, scale in zip(adapted, scales):
            module.scale = scale


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers; a quantised weight counts what it stands for."""
    trainable = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    total = sum(array.size for _, array in tree_flatten(model.parameters()))
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            total += module.weight.size * (32 // module.bits - 1)
            total -= sum(module[name].size for name in ("scales", "biases") if name in module)
    return trainable, total


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Paths of the linear layers that the configuration names.

    Raises:
        ConfigError: a name matches nothing; lists what there is.
    """
    layers_path, num_layers = find_layers(model)
    if config.num_layers is not None and config.num_layers > num_layers:
        raise ConfigError(f"num_layers {config.num_layers} exceeds the model's {num_layers} layers")
    first = num_layers - (config.num_layers or num_layers)
    candidates: dict[str, str] = {}  # path → name inside its layer
    for path, module in model.named_modules():
        # An adapted layer stands for the plain one inside it.
        if not isinstance(module, nn.Linear | nn.QuantizedLinear | LoRALinear):
            continue
        within = path.removeprefix(f"{layers_path}.")
        number, _, name = within.partition(".")
        is_inner = path.endswith(".linear") and isinstance(module_at(model, path[:-7]), LoRALinear)
        if within != path and not is_inner and int(number) >= first:
            candidates[path] = name
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        return _in_order(candidates)
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    _require_matches(wanted, candidates)
    return _in_order(p for p, name in candidates.items() if any(_matches(name, w) for w in wanted))


def _in_order(paths) -> list[str]:
    found = sorted(paths, key=lambda path: [int(p) if p.isdigit() else -1 for p in path.split(".")])
    if not found:
        raise ConfigError("this model has no linear layers to adapt")
    return found


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _require_matches(wanted: list[str], candidates: dict[str, str]) -> None:
    unmatched = [w for w in wanted if not any(_matches(n, w) for n in candidates.values())]
    if unmatched:
        names = reversed(candidates.values())  # MLX walks a network from its end
        there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise ConfigError(
            f"target_modules {unmatched} match nothing",
            cure=f"This model has {there}; or use {ALL_LINEAR!r}.",
        )


def _key_for(root: mx.array, path: str) -> mx.array:
    # From the path, not from a count: the same layer starts alike whatever else is adapted.
    number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8])
    seed = root.tolist()
    return mx.random.key((number ^ ((seed[0] << 32) | seed[1])) & ((1 << 64) - 1))
