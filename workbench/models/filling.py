"""Tensors of a file become the parameters of a network, and a report says which."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.models.report import LoadReport, compare

EMBEDDING = "model.embed_tokens.weight"


def cast(tensor: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """The tensor as `dtype` if it holds floating-point numbers, else as it is."""
    if dtype is None or not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor
    return tensor.astype(dtype)


def fill(
    model: nn.Module,
    weights: Mapping[str, mx.array],
    *,
    source: str,
    file_dtypes: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
) -> LoadReport:
    """Put the tensors that fit into the network, and report on all of them."""
    expected = dict(tree_flatten(model.parameters()))
    tied = "lm_head.weight" not in expected

    def ignorable(name: str) -> bool:
        # Old checkpoints store RoPE's frequencies; tied ones may store the head twice.
        if name == "lm_head.weight" and tied and EMBEDDING in weights:
            return mx.array_equal(weights[name], weights[EMBEDDING]).item()
        return name.endswith("rotary_emb.inv_freq")

    report = compare(
        expected,
        weights,
        source=source,
        ignorable=ignorable,
        file_dtypes=file_dtypes,
        notes=notes,
    )
    loaded = [(name, weights[name]) for name in report.loaded]
    model.load_weights(loaded, strict=False)
    return report
