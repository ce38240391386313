"""Whether a base model is the one that an adapter was made on: a few of its numbers tell.

Shapes do not tell: an adapter fits every base of the same architecture, and on another one it is
noise. So some numbers of each adapted layer's base weight stand in the metadata of the adapter's
file, which mlx-lm and PEFT pass over. A hash would not do: the same base in 16 or 4 bits is a
base that people mean to use.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Collection, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.errors import AdapterWarning, FileFormatError, WeightsError
from workbench.models.loading import BaseModel
from workbench.models.sources import hub_name
from workbench.models.structure import module_at
from workbench.tuning.lora_layers import linear_dims, plain_weight

KEY = "workbench.base"  # in the metadata of a safetensors file
NUMBERS = 256  # about so many in all, and of each layer
LEAST_OF_A_LAYER = 4
ROUNDED = 0.02  # of their size: what numbers of 16 bits differ by, and more
ANOTHER = 0.7  # of their size: 2 bits differ by less, unrelated numbers by 1 or more


def sketch(model: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """Metadata for the file of an adapter on the layers at these paths."""
    each = max(LEAST_OF_A_LAYER, -(-NUMBERS // max(1, len(paths))))
    numbers = _numbers(model, paths, each).astype("<f4")
    return {KEY: base64.b64encode(numbers.tobytes()).decode("ascii")}


def require_base(
    base: BaseModel,
    paths: Collection[str],
    metadata: Mapping[str, str],
    named: object,
    where: object,
    any_base: bool = False,
) -> None:
    """Compare a base with the one that an adapter was made on.

    Args:
        base: the base that the adapter is to be attached to; its shapes fit.
        paths: of the layers that it adapts.
        metadata: of the adapter's file; one that other tools wrote has no sketch.
        named: the base model's name in its configuration, compared where there is no sketch.
        where: the file, for messages.
        any_base: warn of another base, and do not refuse it.

    Raises:
        WeightsError: the adapter was made on another base.
        FileFormatError: the sketch is damaged.

    Warns:
        AdapterWarning: the numbers differ a little, or only the name does.
    """
    if KEY not in metadata:
        return _warn_of_another_name(base, named, where)
    theirs = _read(metadata[KEY], len(paths), where)
    ours = _numbers(base.model, paths, len(theirs) // len(paths))
    apart = _size(ours - theirs) / max(_size(theirs), np.finfo(np.float32).tiny)
    what = f"was made on a base model whose numbers differ from {base.name!r} by {apart:.0%}"
    what += ": another model" if apart >= ANOTHER else ": in fewer bits, or trained further"
    if apart >= ANOTHER and not any_base:
        name = named if isinstance(named, str) and named else "the model that it was made on"
        raise WeightsError(what, where=where, cure=f"Load {name[:200]}, or pass any_base=True.")
    if apart > ROUNDED:
        warnings.warn(f"{where}: {what}.", AdapterWarning, stacklevel=4)  # where it is loaded


def _numbers(model: nn.Module, paths: Collection[str], each: int) -> np.ndarray:
    """(layers · each,): numbers along the diagonal of every layer's weight, in float32."""
    found = []
    for path in sorted(paths):
        module = module_at(model, path)
        linear = getattr(module, "linear", module)
        in_dims, out_dims = linear_dims(linear)
        rows, columns = (mx.arange(each) * dims // each for dims in (out_dims, in_dims))
        found.append(plain_weight(linear, rows)[mx.arange(each), columns])
    return np.array(mx.concatenate(found))


def _read(text: str, num_layers: int, where: object) -> np.ndarray:
    try:
        numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except ValueError:
        numbers = np.array([], "<f4")
    if not len(numbers) or len(numbers) % num_layers or not np.isfinite(numbers).all():
        raise FileFormatError(
            f"its note {KEY!r} of the base model is damaged", where=where, cure="Save it again."
        )
    return numbers


def _size(numbers: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(numbers, dtype=np.float64))))


def _warn_of_another_name(base: BaseModel, named: object, where: object) -> None:
    """Warn if an adapter says that it was made for a model of another name; shapes fit."""
    if not isinstance(named, str) or not named:
        return
    ours = (base.name, str(base.path), base.raw_config.get("_name_or_path"))
    known = {part for name in ours if isinstance(name, str) for part in _last_parts(name)}
    if not known & _last_parts(named):
        warnings.warn(
            f"{where}: was made for {named[:200]!r}; this is {base.name!r}. Every shape fits; "
            "whether the numbers do, only that model can tell.",
            AdapterWarning,
            stacklevel=5,
        )


def _last_parts(name: str) -> set[str]:
    """What a model is called without its owner or place; a built-in one has two names."""
    names = (name, hub_name(name))
    return {each.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold() for each in names}
