"""What trains without an adapter: the head, everything, or nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.errors import ConfigError, check_kind
from workbench.models.decoder import Decoder
from workbench.models.layers import HeadLinear
from workbench.models.loading import BaseModel
from workbench.models.partial_runs import paths_above
from workbench.models.structure import module_at
from workbench.tuning.lora import count_parameters, remove_lora

MODES = ("head", "full", "frozen")
QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass(frozen=True, repr=False)
class Trainable:
    """What `set_trainable` left to train."""

    mode: str
    names: tuple[str, ...]  # of the parameters
    trainable: int  # numbers that training may change
    total: int  # numbers in the network

    @property
    def percent(self) -> float:
        """Trainable share of all numbers, in percent."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return (
            f"{self.mode}: {len(self.names)} tensors, {self.trainable:,} of {self.total:,} "
            f"numbers train ({self.percent:.2f} %)"
        )

    __repr__ = __str__


def set_trainable(model: nn.Module, mode: str) -> Trainable:
    """Choose what trains, without an adapter; one that is attached is removed.

    Args:
        model: a network.
        mode: `head` (what stands behind the decoder layers: final norm and lm_head), `full`
            (every parameter) or `frozen` (none; an adapter stays attached, and is frozen too).

    Raises:
        ConfigError: no network, an unknown mode, a head that is the embedding, or quantised
            weights, which have no gradient. The network is then left as it was.
    """
    check_kind("model", model, nn.Module, "Give a network, such as base.model.")
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}", cure=f"Use one of {MODES}, or wb.add_lora.")
    if mode == "frozen":
        model.freeze()
        return Trainable(mode, (), *count_parameters(model))
    find = _head_paths if mode == "head" else _all_paths
    _require_plain(model, find(model))  # before anything is changed
    remove_lora(model)
    model.freeze()
    for path in find(model):
        module = module_at(model, path)
        whole = [k for k, v in module.items() if isinstance(v, mx.array) and not _is_float(v)]
        module.unfreeze(recurse=False)
        module.freeze(recurse=False, keys=whole)
    names = tuple(sorted(name for name, _ in tree_flatten(model.trainable_parameters())))
    return Trainable(mode, names, *count_parameters(model))


def untie_head(base: BaseModel) -> None:
    """Give the head weights of its own, equal to the embedding's; without effect if it has some.

    It can then be trained by itself, or adapted. What is exported afterwards is not tied either.

    Raises:
        ConfigError: the network is none of ours.
    """
    model = base.model
    if not isinstance(model, Decoder):
        raise ConfigError(f"cannot untie the head of a {type(model).__name__}")
    if not model.config.tie_word_embeddings:
        return
    embedding = model.model.embed_tokens
    if isinstance(embedding, nn.QuantizedEmbedding):
        raise ConfigError("the embedding is quantised", cure="Load the model without quantise.")
    model.lm_head = HeadLinear(*reversed(embedding.weight.shape), bias=False)
    model.lm_head.weight = embedding.weight
    model.lm_head.freeze()
    model.lm_head.train(model.training)
    model.config = base.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    base.raw_config = {**base.raw_config, "tie_word_embeddings": False}


def _head_paths(model: nn.Module) -> list[str]:
    modules = [(path, module_at(model, path)) for path in paths_above(model)]
    found = [p for p, m in modules if any(isinstance(value, mx.array) for value in m.values())]
    if not any(_has_matrix(module_at(model, path)) for path in found):
        raise ConfigError(
            "the head is the embedding, which the first layer reads, too",
            cure="Give it weights of its own: wb.untie_head(base); or train 'full'.",
        )
    return found


def _has_matrix(module: nn.Module) -> bool:
    return any(isinstance(value, mx.array) and value.ndim == 2 for value in module.values())


def _all_paths(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules()]


def _require_plain(model: nn.Module, paths: list[str]) -> None:
    quantised = [path for path in paths if isinstance(module_at(model, path), QUANTISED)]
    if quantised:
        raise ConfigError(
            f"{len(quantised)} modules are quantised and have no gradient, {quantised[0]} first",
            cure="Load the model without quantise, or attach an adapter: wb.add_lora.",
        )


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
