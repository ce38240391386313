"""Whether something in a network drops out."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.nn as nn


def first_dropout(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Path of the first module that sets numbers to zero at random in training; "" if none does."""
    return next((path for path, module in modules if _drops(module)), "")


def _drops(module: nn.Module) -> bool:
    is_dropout = isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d)
    return is_dropout and module._p_1 < 1
