"""The header of a safetensors file, checked in Python before MLX reads the tensors.

MLX accepts overlaps, holes, trailing bytes, keys that come twice, and shapes that wrap. The layout
follows the specification in the safetensors repository (README.md, "Format").
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from workbench.errors import FileFormatError
from workbench.models.regular_files import open_regular, parse_json

MAX_HEADER_BYTES = 100_000_000  # the specification's own bound
MAX_DIMS = 32
MAX_DIM = 2**31 - 1  # MLX counts in int32
MAX_NAME = 1024  # characters
METADATA = "__metadata__"
DTYPES = {  # the file's name: what MLX makes of it; 8-bit floats come as their bytes
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "C64": mx.complex64,
}


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of a tensor."""

    dtype: mx.Dtype  # as MLX reads it
    shape: tuple[int, ...]
    start: int  # byte, counted from the end of the header
    end: int


def read_header(path: str | Path, *, inside: str | Path | None = None) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file holds, from its header alone.

    Every byte of the file belongs to the header or to exactly one tensor.

    Args:
        path: the file.
        inside: the folder that links may not lead out of; default the file's own.

    Raises:
        FileFormatError: absent, not a regular file, or against the specification.
    """
    return _read(path, inside)[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file says of itself, by name; raises as `read_header` does."""
    return _read(path)[1]


def _read(
    path: str | Path, inside: str | Path | None = None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    path = Path(path)
    with open_regular(path, inside=inside or path.parent) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            header = _header_object(file.read(8), file, size)
            data_size = size - file.tell()
            metadata = _checked_metadata(header.pop(METADATA, None))
            entries = {name: _entry(name, fields) for name, fields in header.items()}
            _check_places(entries, data_size)
        except (ValueError, OSError) as error:
            raise FileFormatError(
                f"is not a whole safetensors file ({error})",
                where=path,
                cure="Fetch it again; a git-lfs pointer or a broken download looks like this.",
            ) from None
    return entries, metadata


def _header_object(prefix: bytes, file, size: int) -> dict[str, object]:
    if len(prefix) < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"it promises a header of {length} bytes; {MAX_HEADER_BYTES} is the most")
    if length > size - 8:
        raise ValueError(f"it promises a header of {length} bytes and ends after {size - 8}")
    content = file.read(length)
    if content[:1] != b"{" or content.rstrip(b" ")[-1:] != b"}":
        raise ValueError("its header is no JSON object")
    return parse_json(content, constants=False)


def _checked_metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{METADATA} must hold strings by name")
    return metadata


def _entry(name: str, fields: object) -> TensorEntry:
    # Names are shown in messages and tables: no control characters, no change of direction.
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"it has a tensor with the impossible name {name[:100]!r}")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets, and no more")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the dtype {str(dtype)[:100]!r}, which MLX lacks")
    if not _are_counts(shape) or len(shape) > MAX_DIMS or max(shape, default=0) > MAX_DIM:
        raise ValueError(f"tensor {name!r} has the impossible shape {str(shape)[:100]}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has the impossible data_offsets {str(offsets)[:100]}")
    needed, (start, end) = math.prod(shape) * DTYPES[dtype].size, offsets
    if end - start != needed:
        raise ValueError(f"tensor {name!r} needs {needed} bytes and has {end - start}")
    return TensorEntry(DTYPES[dtype], tuple(shape), start, end)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_places(entries: Mapping[str, TensorEntry], data_size: int) -> None:
    """One tensor begins where the one before it ends, and the last ends with the file."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            problem = "overlaps another" if entry.start < position else "leaves a hole before it"
            raise ValueError(f"tensor {name!r} {problem}")
        position = entry.end
    if position != data_size:
        problem = "is cut off" if position > data_size else "has bytes after its last tensor"
        raise ValueError(f"it {problem}: tensors end at {position}, the file at {data_size}")
