"""Quantised weights: what config.json says of them, and a network that is quantised on request."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import ConfigError, FileFormatError

GROUP_SIZES, BITS = (16, 32, 64, 128), (2, 3, 4, 5, 6, 8)
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def check_quantisation(quantization: object, where: object) -> None:
    """Raise ConfigError unless MLX has what config.json's `quantization` says of every layer."""
    if not isinstance(quantization, dict):
        raise ConfigError("quantization must be an object", where=where)
    quantisation_settings(quantization, "")
    for path, own in quantization.items():
        if isinstance(own, dict):
            quantisation_settings(quantization, path)


def quantisation_settings(quantization: Mapping[str, object], path: str) -> dict[str, object]:
    """group_size, bits and mode of the layer at `path`; its own where it has them.

    Raises:
        ConfigError: one is missing, or none that MLX has.
    """
    own = quantization.get(path)
    settings = {**quantization, **own} if isinstance(own, dict) else quantization
    group_size, bits = settings.get("group_size"), settings.get("bits")
    mode = settings.get("mode", "affine")
    for value, known in ((group_size, GROUP_SIZES), (bits, BITS), (mode, MODES)):
        if isinstance(value, bool | float) or value not in known:
            raise ConfigError(
                f"needs group_size and bits, and perhaps a mode, that MLX has; got {group_size!r}, "
                f"{bits!r} and {mode!r}",
                where="config.json: quantization",
            )
    return {"group_size": group_size, "bits": bits, "mode": mode}


def quantise_like_file(
    model: nn.Module, quantization: Mapping[str, object], weights: Mapping[str, mx.array]
) -> None:
    """Quantise the layers of a network that are quantised in its file, each as the file says."""

    def settings_for(path: str, module: nn.Module) -> bool | dict[str, object]:
        quantised = hasattr(module, "to_quantized") and f"{path}.scales" in weights
        return quantisation_settings(quantization, path) if quantised else False

    nn.quantize(model, class_predicate=settings_for)


def dequantise(
    weights: Mapping[str, mx.array], quantization: Mapping[str, object]
) -> dict[str, mx.array]:
    """A file's tensors with every quantised weight as plain numbers.

    Raises:
        ConfigError: a layer's settings are none that MLX has.
        FileFormatError: a weight does not fit its settings; names it.
    """
    plain = {}
    for name, tensor in weights.items():
        path, _, kind = name.rpartition(".")
        if f"{path}.scales" not in weights or kind == "bias":
            plain[name] = tensor
        elif kind == "weight":
            scales, biases = weights[f"{path}.scales"], weights.get(f"{path}.biases")
            settings = quantisation_settings(quantization, path)
            try:
                plain[name] = mx.dequantize(tensor, scales, biases, **settings)
            except ValueError as error:
                raise FileFormatError(f"cannot be dequantised ({error})", where=name) from None
    return plain


def quantise(model: nn.Module, settings: Mapping[str, object]) -> str:
    """Quantise every linear layer and embedding whose rows divide into groups.

    Args:
        model: with its weights; changed in place.
        settings: `bits` and `group_size`, perhaps a `mode`, as MLX has them.

    Returns:
        What was done, in words.

    Raises:
        ConfigError: settings that MLX does not have, or nothing that can be quantised.
    """
    settings = given_settings(settings)
    group_size = settings["group_size"]
    layers = [m for _, m in model.named_modules() if hasattr(m, "to_quantized")]
    fitting = {id(m) for m in layers if m.weight.shape[-1] % group_size == 0}
    if not fitting:
        raise ConfigError(f"no layer's rows divide into groups of {group_size}, or all are already")
    nn.quantize(model, class_predicate=lambda _, m: settings if id(m) in fitting else False)
    left = f", {len(layers) - len(fitting)} do not divide" if len(fitting) < len(layers) else ""
    return f"{len(fitting)} layers quantised to {settings['bits']} bits by {group_size}{left}"


def given_settings(settings: object) -> dict[str, object]:
    """bits, group_size and mode of what a caller asks for; raises ConfigError as `quantise`."""
    try:
        if not isinstance(settings, Mapping) or set(settings) - {"bits", "group_size", "mode"}:
            raise ConfigError(f"got {reprlib.repr(settings)}")
        return quantisation_settings({"group_size": 64, **settings}, "")
    except ConfigError as error:
        cure = 'Such as {"bits": 4, "group_size": 64}; True keeps what the file has.'
        raise ConfigError(error.what, where="quantise", cure=cure) from None
