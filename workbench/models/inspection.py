"""Where the bytes of a weights file lie, which module they belong to, and how their rows stand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.errors import ConfigError
from workbench.models.files import read_safetensors
from workbench.models.gguf_format import GGUFFile

LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little-endian
LAYER = re.compile(r"(?:^|.*\.)(?:layers|h|blk)\.(\d+)\.(.+)")


def read_layout(path: str | Path) -> pd.DataFrame:
    """Where every tensor lies in a .safetensors or .gguf file; the tensors are not read.

    Returns:
        One row a tensor, in the order of their bytes: name, dtype (as the file calls it), shape,
        start and end (bytes from the beginning of the file), num_bytes.

    Raises:
        FileFormatError: absent, truncated, or out of bounds anywhere.
    """
    path = Path(path)
    rows = _gguf_rows(path) if path.suffix == ".gguf" else _safetensors_rows(path)
    table = pd.DataFrame(rows, columns=["name", "dtype", "shape", "start", "end"])
    table["num_bytes"] = table.end - table.start
    return table.sort_values("start", ignore_index=True)


def _gguf_rows(path: Path) -> list[tuple]:
    tensors = GGUFFile(path).tensors.values()
    return [(t.name, t.kind.name, t.shape, t.start, t.start + t.size) for t in tensors]


def _safetensors_rows(path: Path) -> list[tuple]:
    read_safetensors(path)  # validates every offset; its arrays are lazy
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    origin = LENGTH_BYTES + length
    return [
        (
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            *(origin + at for at in entry["data_offsets"]),
        )
        for name, entry in header.items()
    ]


def split_name(name: str) -> tuple[str, str]:
    """A parameter's block and module, without `weight` or `bias`.

    `model.layers.3.mlp.up_proj.weight` → (`layer 3`, `mlp.up_proj`);
    `model.embed_tokens.weight` → (`embed_tokens`, `embed_tokens`).
    """
    in_layer = LAYER.fullmatch(name)
    if in_layer:
        return f"layer {in_layer[1]}", in_layer[2].rpartition(".")[0] or in_layer[2]
    module = (name.rpartition(".")[0] or name).removeprefix("model.")
    return module, module


def row_likeness(weights: Sequence[np.ndarray], heads: int) -> np.ndarray:
    """How alike the rows of an attention head are in length, over all heads of all layers.

    RoPE turns two rows as a pair, at one speed; training leaves rows of like speed alike in
    length. So the order of the rows can be read from the weights themselves.

    Args:
        weights: a q or k projection a layer, each (heads · head_dim, in).
        heads: number of heads that the rows belong to.

    Returns:
        (head_dim, head_dim) correlations of the logarithm of the rows' lengths, each relative to
        its head's mean; NaN for a row whose length is the same in every head. Heads with a row
        of zeros are left out.

    Raises:
        ConfigError: fewer than three heads to compare, or rows that do not make so many heads.
    """
    cure = "Give whole projections with three heads or more in all."
    if heads < 1 or not weights or any(len(weight) % heads for weight in weights):
        raise ConfigError(f"rows of {len(weights)} weights do not make {heads} heads", cure=cure)
    lengths = [np.linalg.norm(weight.astype(np.float64), axis=1) for weight in weights]
    by_head = np.concatenate([length.reshape(heads, -1) for length in lengths])
    by_head = by_head[(by_head > 0).all(axis=1)]
    if len(by_head) < 3:
        raise ConfigError(f"{len(by_head)} heads are too few to compare", cure=cure)
    logs = np.log(by_head)
    logs = logs - logs.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(logs, rowvar=False)


def half_apart(likeness: np.ndarray) -> float:
    """Mean likeness of the rows i and i + head_dim / 2, the partners in the half-split layout.

    Args:
        likeness: (head_dim, head_dim) of `row_likeness`.
    """
    half = len(likeness) // 2
    return float(np.nanmean(np.diagonal(likeness, offset=half)))
