"""The adapter of a network, as files see it: its arrays, and one description of where it is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import ConfigError, FileFormatError, WeightsError
from workbench.models.files import write_json, write_safetensors
from workbench.models.report import compare
from workbench.models.structure import find_layers, module_at
from workbench.numerics import not_finite
from workbench.tuning.lora import Adapter, LoRAConfig, add_lora, expert_names, find_targets
from workbench.tuning.lora_layers import DoRALinear, LoRALinear, linear_dims

CONFIG_NAME = "adapter_config.json"  # in mlx-lm's layout and in PEFT's


@dataclass(frozen=True)
class Attached:
    """What is attached to a network, where one description fits all of it."""

    rank: int
    scale: float  # factor on the update
    dropout: float
    use_dora: bool
    names: tuple[str, ...]  # of the adapted modules inside their layer, such as self_attn.q_proj
    first: int  # adapted layer; in it and all after it, every module of these names is adapted
    total: int  # layers of the network

    @property
    def num_layers(self) -> int:
        """Number of layers from the first adapted one on."""
        return self.total - self.first


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """Every array that belongs to the adapter, by name."""
    return {
        f"{path}.{name}": module[name]
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for name in module.parts
    }


def modules_of(weights: Iterable[str]) -> set[str]:
    """Paths of the adapted layers that arrays of these names belong to."""
    return {name.rpartition(".")[0] for name in weights}


def describe(model: nn.Module) -> Attached:
    """One description of the attached adapter.

    Raises:
        ConfigError: no adapter is attached, it is switched off, or one description cannot say
            what it is, neither in mlx-lm's layout nor as a `LoRAConfig`.
    """
    adapted, settings = [], set()
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            adapted.append(path)
            kind = "DoRA" if isinstance(module, DoRALinear) else "LoRA"
            settings.add((module.lora_a.shape[1], module.scale, module.dropout_rate, kind))
    if not adapted:
        raise ConfigError("no adapter is attached", cure="Attach one: wb.add_lora(base.model).")
    cure = "wb.fuse writes the whole model, with any adapter in its weights."
    if len(settings) > 1:
        raise ConfigError(
            "an adapter's file has one rank, scale, dropout and kind for all layers; here are "
            f"{' and '.join(map(str, sorted(settings)[:2]))}",
            cure=cure,
        )
    names, first, total = common_place(model, adapted, cure)
    rank, scale, dropout, kind = settings.pop()
    if not scale:
        raise ConfigError("the adapter is switched off", cure="Leave wb.adapter_disabled first.")
    return Attached(rank, scale, dropout, kind == "DoRA", names, first, total)


def common_place(
    model: nn.Module, adapted: Collection[str], cure: str
) -> tuple[tuple[str, ...], int, int]:
    """Names inside a layer, the first adapted layer and the number of layers.

    Layers need not be alike: one without a module of some name is passed over. But what has such
    a name, from the first adapted layer on, must be adapted.

    Args:
        model: with or without the adapter.
        adapted: paths of linear layers inside the network's layers.
        cure: of the refusal.

    Raises:
        ConfigError: a module of such a name is not adapted; names it.
    """
    layers_path, total = find_layers(model)
    places = [path.removeprefix(f"{layers_path}.").partition(".") for path in adapted]
    names = tuple(sorted({name for _, _, name in places}))
    first = min(int(number) for number, _, _ in places)
    alike = find_targets(model, LoRAConfig(target_modules=names, num_layers=total - first))
    # mlx-lm would also take what is no linear layer.
    there, layers = dict(model.named_modules()), range(first, total)
    alike += [path for n in layers for x in names if (path := f"{layers_path}.{n}.{x}") in there]
    left = [path for path in alike if path not in adapted]
    if left:
        number, _, name = left[0].removeprefix(f"{layers_path}.").partition(".")
        raise ConfigError(
            f"an adapter's file names its modules once for the last {total - first} layers, and "
            f"layer {number} has {name} without an adapter",
            cure=cure,
        )
    return names, first, total


def expected_arrays(model: nn.Module, config: LoRAConfig) -> dict[str, mx.array]:
    """Zeros of the shapes that an adapter of this configuration has, by name; they are lazy.

    Raises:
        ConfigError: the configuration does not fit the network.
    """
    expected = {}
    for path in find_targets(model, config):
        module = module_at(model, path)
        in_dims, out_dims = linear_dims(getattr(module, "linear", module))
        expected[f"{path}.lora_a"] = mx.zeros((in_dims, config.rank))
        expected[f"{path}.lora_b"] = mx.zeros((config.rank, out_dims))
        if config.use_dora:
            expected[f"{path}.m"] = mx.zeros((out_dims,))
    return expected


def require_fit(
    expected: Mapping[str, mx.array], found: Mapping[str, mx.array], where: object
) -> None:
    """Raise WeightsError unless a file's tensors are all and only the expected ones, and finite."""
    require_finite(found, where)
    try:
        compare(expected, found, source=str(where)).require_complete()
    except WeightsError as error:
        cure = "The adapter is for another base model or another rank, or its file is incomplete."
        raise WeightsError(error.what, where=error.where, cure=cure) from None


def require_no_experts(model: nn.Module, found: Iterable[str], where: object) -> None:
    """Raise WeightsError if tensors of these names adapt experts that lie in one stack."""
    experts = set(expert_names(model))
    stacked = sorted(name for name in found if name.rpartition(".")[0] in experts)
    if stacked:
        raise WeightsError(
            f"{stacked[0]} and {len(stacked) - 1} more adapt stacked experts, which cannot be "
            "represented here",
            where=where,
            cure="mlx_lm.fuse makes a plain model of it; wb.add_lora leaves such experts frozen.",
        )


def require_finite(weights: Mapping[str, mx.array], where: object) -> None:
    """Raise WeightsError naming an array that holds NaN or infinity."""
    bad = not_finite(weights)
    if bad:
        raise WeightsError(f"{bad[0]} holds NaN or infinity", where=where)


def attach(model: nn.Module, config: LoRAConfig, weights: Mapping[str, mx.array]) -> Adapter:
    """Attach an adapter with weights that `expected_arrays` fits; one that is there is replaced."""
    adapter = add_lora(model, config)
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.trainable_parameters())
    return adapter


def write_pair(
    folder: Path,
    config: Mapping[str, object],
    weights_name: str,
    weights: Mapping[str, mx.array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapter_config.json and the weights; an older pair is replaced.

    Raises:
        FileFormatError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as staging:
            write_safetensors(Path(staging, weights_name), weights, metadata)
            write_json(Path(staging, CONFIG_NAME), config)
            # Killed between the two, this leaves a folder that does not load, never a mixture.
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            os.replace(Path(staging, weights_name), folder / weights_name)
            os.replace(Path(staging, CONFIG_NAME), folder / CONFIG_NAME)
    except OSError as error:
        raise FileFormatError(f"cannot be written ({error.strerror})", where=folder) from error


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Refusals of a configuration name the file that it came from."""
    try:
        yield
    except ConfigError as error:
        where = error.where or file
        raise ConfigError(error.what[:1000], where=where, cure=error.cure) from None
