"""GGUF files written field by field, so that every field can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench.models.gguf_format import GGUFFile

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Raw:
    """A metadata value as bytes, with the number of its type."""

    kind: int
    content: bytes


def text(value: str | bytes) -> bytes:
    """A string with its length before it."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def array(kind: int, *items: bytes) -> Raw:
    """An array of items that are bytes already."""
    return Raw(ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(items))


def value_of(value: object) -> Raw:
    """A Python value as GGUF would hold it."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool):
        return Raw(BOOL, bytes([value]))
    if isinstance(value, int):
        return (
            Raw(INT32, struct.pack("<i", value)) if value < 0 else Raw(10, struct.pack("<Q", value))
        )
    if isinstance(value, float):
        return Raw(FLOAT32, struct.pack("<f", value))
    if isinstance(value, str):
        return Raw(STRING, text(value))
    items = [value_of(item) for item in value]
    return array(items[0].kind if items else STRING, *(item.content for item in items))


def pack(metadata: Mapping[str, object], tensors: Mapping[str, np.ndarray]) -> bytes:
    """A GGUF file of version 3 with float32 tensors."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        raw = value_of(value)
        content += text(key) + struct.pack("<I", raw.kind) + raw.content
    data = b""
    for name, values in tensors.items():
        shape = values.shape[::-1]
        content += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        content += struct.pack("<IQ", 0, len(data))
        data += values.astype(np.float32).tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    return content + bytes(-len(content) % ALIGNMENT) + data


def unpack(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Metadata and tensors of a valid file, for `pack`."""
    file = GGUFFile(path)
    return dict(file.metadata), {name: file.read(name).copy() for name in file.tensors}
