"""A network's weights as a file holds them: adapters fused in, plain or quantised, in shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.errors import ConfigError, WeightsError
from workbench.export.attached import adapter_weights, require_finite
from workbench.models.files import INDEX_NAME, write_json, write_safetensors
from workbench.models.loading import cast
from workbench.models.quantisation import quantisation_settings
from workbench.tuning.lora_layers import SMALLEST, LoRALinear

Tensors = dict[str, mx.array]
ROUNDING = 0.005  # of a weight's size: bfloat16 keeps 8 bits


def fused_weights(model: nn.Module, dtype: mx.Dtype | None = None) -> Tensors:
    """Every parameter of the network without its adapter's modules, by name; the arrays are lazy.

    An adapted layer has the one weight that does the same; a quantised one is dequantised.

    Args:
        model: with or without an adapter; it is not changed.
        dtype: of floating-point numbers; default as the network holds each.

    Raises:
        ConfigError: an adapter cannot be fused here.
        WeightsError: a layer's weight would hold no floating-point numbers.
    """
    modules, usual = dict(model.named_modules()), _usual_dtype(model)
    keep = getattr(model, "cast_predicate", lambda name: True)  # mlx-lm: what 16 bits would spoil
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        if isinstance(owner, LoRALinear):
            continue  # lora_a, lora_b, m: they are in the weight
        outer = path.removesuffix(".linear")
        adapted = modules.get(outer) if outer != path else None
        if isinstance(adapted, LoRALinear):
            name = f"{outer}.{leaf}"
        if "scales" in (owner or {}) and leaf in ("scales", "biases"):
            continue
        if leaf == "weight" and (isinstance(adapted, LoRALinear) or "scales" in (owner or {})):
            array = _plain(name, owner, adapted, usual)
        weights[name] = cast(array, dtype if keep(name) else None)
    left = [name for name in weights if name.endswith((".lora_a", ".lora_b"))]
    if left:
        raise ConfigError(f"{left[0]} belongs to an adapter that cannot be fused here")
    return weights


def _plain(name: str, module: nn.Module, adapted: nn.Module | None, usual: mx.Dtype) -> mx.array:
    """The weight of a quantised or an adapted layer as numbers, in the dtype it is held in."""
    held = module.get("scales", module.weight).dtype
    if "scales" in module and not mx.issubdtype(held, mx.floating):
        held = usual  # mxfp4, mxfp8 and nvfp4 keep their scales as bytes
    if not mx.issubdtype(held, mx.floating):
        raise WeightsError(f"{name} holds {held}, not floating-point numbers")
    if isinstance(adapted, LoRALinear):
        return adapted.fused_weight().astype(held)
    settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    array = mx.dequantize(module.weight, module.scales, module.get("biases"), **settings)
    return array.astype(held)


def _usual_dtype(model: nn.Module) -> mx.Dtype:
    """Of most floating-point arrays beside the adapter's; bfloat16, as MLX has it, of none."""
    ours = adapter_weights(model)
    found = Counter(
        array.dtype
        for name, array in tree_flatten(model.parameters())
        if name not in ours and mx.issubdtype(array.dtype, mx.floating)
    )
    return found.most_common(1)[0][0] if found else mx.bfloat16


def quantised_weights(
    model: nn.Module, weights: Mapping[str, mx.array], settings: Mapping[str, object]
) -> tuple[Tensors, dict[str, object]]:
    """The weights with those quantised that MLX can quantise, and config.json's `quantization`.

    Args:
        model: what the weights are of; its architecture may exempt layers, or give them settings
            of their own (mlx-lm's `quant_predicate`).
        weights: as `fused_weights` gives them.
        settings: bits and group_size.
    """
    predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    usual = {**settings, "mode": "affine"}
    chosen, written = dict[str, object](usual), dict(weights)
    for path, module in model.named_modules():
        # An adapted layer stands for the plain one inside it.
        plain = module.linear if isinstance(module, LoRALinear) else module
        weight = weights.get(f"{path}.weight")
        is_quantised = "scales" in plain  # in memory; its class has no to_quantized then
        if weight is None or not (is_quantised or hasattr(plain, "to_quantized")):
            continue
        own = predicate(path, plain)
        layer = {**usual, **own} if isinstance(own, dict) else usual
        if not own or weight.shape[-1] % layer["group_size"]:
            continue
        layer = quantisation_settings(layer, path)
        if isinstance(own, dict):
            chosen[path] = layer  # whole: what is left out, mlx-lm takes from its own defaults
        parts = mx.quantize(weight, **layer)
        names = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
        written.update(zip(names, parts))
    return written, chosen


def require_read_back(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Raise WeightsError if mlx-lm would change these weights as it reads them.

    An architecture's `sanitize` makes its parameters of another tool's files. Of most, it leaves
    alone what it made; baichuan_m1's gives every row of the head a length of one once more.
    """
    sanitize = getattr(model, "sanitize", None)
    if sanitize is None:
        return
    read = sanitize(dict(weights))
    for name in sorted(weights.keys() | read.keys()):
        ours, theirs = weights.get(name), read.get(name)
        if ours is theirs:
            continue
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise WeightsError(f"mlx-lm would rename or reshape {name} as it reads it")
        numbers = ours.astype(mx.float32)
        apart = mx.linalg.norm(numbers - theirs) / mx.maximum(mx.linalg.norm(numbers), SMALLEST)
        if apart.item() > ROUNDING:
            raise WeightsError(
                f"mlx-lm would change {name} by {apart.item():.2%} as it reads it",
                cure='Write it quantised, which is left alone: quantise={"bits": 8, …}.',
            )


def write_shards(folder: Path, weights: Tensors, max_shard_bytes: int) -> None:
    """Write model.safetensors, or shards of at most so many bytes and their index.

    A tensor that is larger has a shard of its own. `weights` is emptied on the way, so that a
    shard's arrays can go when it is written.

    Raises:
        WeightsError: a weight holds NaN or infinity.
        FileFormatError: the folder cannot be written.
    """
    shards = [*_shards(weights, max_shard_bytes)]
    total_bytes = sum(array.nbytes for array in weights.values())
    weight_map = {}
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = (
            "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        shard = {name: weights.pop(name) for name in names}
        try:
            require_finite(shard, folder.name)
        except WeightsError as error:
            cure = "Is dtype too small for it? float16 ends at 65504; bfloat16 does not."
            raise WeightsError(error.what, cure=cure) from None
        write_safetensors(folder / file, shard)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / INDEX_NAME, index)


def _shards(weights: Mapping[str, mx.array], max_shard_bytes: int) -> Iterator[list[str]]:
    names, num_bytes = [], 0
    for name in sorted(weights):
        size = weights[name].nbytes
        if names and num_bytes + size > max_shard_bytes:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    if names:
        yield names
