"""Architectures that mlx-lm builds, with files that are checked before it reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from workbench.errors import ConfigError, FileFormatError
from workbench.models.files import read_weights, weight_files
from workbench.models.filling import cast, fill
from workbench.models.report import LoadReport


def build_with_mlx_lm(
    path: Path, raw_config: dict[str, object], dtype: mx.Dtype | None
) -> tuple[nn.Module, object, LoadReport]:
    """The network of a folder, its configuration, and the report of its tensors.

    Args:
        path: the folder.
        raw_config: its config.json.
        dtype: of the floating-point weights; None: as they are.

    Raises:
        FileFormatError: a file is malformed, or stands beside the index that does not list it.
        ConfigError: mlx-lm cannot build it.
    """
    from mlx_lm import utils

    weights = read_weights(path)  # validated before mlx-lm reads the same files
    unlisted = sorted(set(path.glob("model*.safetensors")) - weight_files(path).keys())
    if unlisted:
        raise FileFormatError("is not listed in the index", where=unlisted[0])
    file_dtypes = {name: str(w.dtype).removeprefix("mlx.core.") for name, w in weights.items()}
    handed: dict[str, mx.array] = {}
    classes = functools.partial(_classes, handed, utils._get_classes)
    try:
        model, _ = utils.load_model(path, lazy=True, strict=False, get_model_classes=classes)
    except Exception as error:  # whatever an architecture makes of a configuration
        reason = repr(str(error)[:300])[1:-1]
        kind = raw_config["model_type"]
        raise ConfigError(f"mlx-lm cannot build a {kind!r} model ({reason})", where=path) from None
    del model.load_weights
    converted = {name: cast(tensor, dtype) for name, tensor in handed.items()}
    report = fill(model, converted, source=str(path), file_dtypes=file_dtypes)
    return model, getattr(model, "args", raw_config), report


def _classes(
    handed: dict[str, mx.array], find: Callable[[dict], tuple], config: dict[str, object]
) -> tuple[Callable[[object], nn.Module], type]:
    """mlx-lm's classes for a configuration; what it would load is handed over instead."""
    model_class, args_class = find(config)

    def build(args: object) -> nn.Module:
        model = model_class(args)
        if "_no_grad" not in vars(model):  # recurrent_gemma's own __init__ leaves that out
            nn.Module.__init__(model)
        # mlx-lm renames and quantises; the result is filled in, and reported, by us.
        model.load_weights = lambda pairs, strict=True: handed.update(pairs)
        return model

    return build, args_class
