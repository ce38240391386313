"""A file of weights says what its numbers are: a SHA-256 that is compared when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from workbench.errors import ConfigError, FileFormatError, is_text
from workbench.models.safetensors_header import read_metadata

SEAL = "sha256"
OURS = ("format", SEAL)  # what a file's metadata holds beside the caller's
MAX_METADATA = 1_000_000  # characters


def sealed(tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A caller's metadata, and the seal of the tensors; about a second for 1 GB.

    Raises:
        ConfigError: the metadata are not texts by name, too long, or take a name of ours.
    """
    metadata = {} if metadata is None else metadata
    words = [*metadata, *metadata.values()] if isinstance(metadata, Mapping) else [None]
    if not all(is_text(word) for word in words):
        raise ConfigError("metadata must be texts by name", cure='Such as {"run": "capitals-001"}.')
    if taken := sorted(set(metadata) & set(OURS)):
        raise ConfigError(f"metadata {taken[0]!r} is written by save_weights itself")
    if sum(map(len, words)) > MAX_METADATA:
        raise ConfigError(f"metadata are longer than {MAX_METADATA} characters")
    return {**metadata, SEAL: digest_of(tensors)}


def require_sealed(path: str | Path, tensors: Mapping[str, mx.array]) -> None:
    """Raise FileFormatError if a file's tensors are not those that its seal, if any, was made of.

    Files of other tools have none.
    """
    promised = read_metadata(path).get(SEAL)
    if promised is not None and promised != digest_of(tensors):
        raise FileFormatError(
            "holds other numbers than were written: its SHA-256 is another",
            where=path,
            cure="Fetch or save it again. Changed on purpose? Write it without that metadata.",
        )


def digest_of(tensors: Mapping[str, mx.array]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    content = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        content.update(f"{name} {array.dtype} {array.shape}\n".encode())
        if array.size:
            # MLX hands out no bfloat16, but the bytes of any type.
            content.update(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))
    return content.hexdigest()
