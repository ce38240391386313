"""Read and write files of tensors: validated before MLX sees them, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from workbench.errors import FileFormatError, SourceError
from workbench.models.regular_files import check_regular, open_regular, parse_json
from workbench.models.safetensors_header import read_header

INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 64_000_000  # a config or an index is far smaller


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary path, moved to `path` on success.

    Raises:
        FileFormatError: the file cannot be written (disk full, no permission, a folder in the way).
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise FileFormatError(
            f"cannot be written ({error.strerror or error})",
            where=path,
            cure="Nothing was changed; choose another place or free some space.",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, object]:
    """Read a JSON object. NaN and Infinity are accepted: some models' configurations hold them.

    Raises:
        FileFormatError: absent, not a regular file, a link out of its folder, too large or too
            deep, not UTF-8, not JSON, a key twice, or not an object.
    """
    path = Path(path)
    if check_regular(path, inside=path.parent) > MAX_JSON_BYTES:
        raise FileFormatError(f"is larger than {MAX_JSON_BYTES} bytes", where=path)
    try:
        with open_regular(path, inside=path.parent) as file:
            content = parse_json(file.read(MAX_JSON_BYTES))
    except FileFormatError:
        raise
    except (ValueError, OSError) as error:
        raise FileFormatError(f"is not valid JSON ({error})", where=path) from None
    if not isinstance(content, dict):
        raise FileFormatError("must hold a JSON object", where=path)
    return content


def write_json(path: str | Path, content: Mapping[str, object]) -> None:
    """Write a JSON object, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_safetensors(path: str | Path) -> dict[str, mx.array]:
    """Read one safetensors file, whose header is checked before MLX sees it.

    Returns:
        name → array, in the file's dtypes; lazy, so the numbers themselves are not checked.

    Raises:
        FileFormatError: absent, not a regular file, a link out of its folder, or against the
            specification of safetensors.
    """
    path = Path(path)
    entries = read_header(path)
    try:
        tensors = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError, OSError) as error:
        raise FileFormatError(f"cannot be read by MLX ({error})", where=path) from None
    read = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if read != {name: (entry.dtype, entry.shape) for name, entry in entries.items()}:
        raise FileFormatError("holds tensors that MLX reads otherwise", where=path)
    return tensors


def weight_files(folder: str | Path) -> dict[Path, set[str] | None]:
    """A model folder's files of weights, each with the tensors that the index promises there.

    Without an index, every `model*.safetensors` with None.

    Raises:
        FileFormatError: the index is malformed, or names a file outside the folder.
        SourceError: the folder holds no safetensors.
    """
    folder = Path(folder)
    if os.path.lexists(folder / INDEX_NAME):
        return _read_index(folder / INDEX_NAME)
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("weights*.safetensors"))
    if not paths:
        raise SourceError(
            "holds no model*.safetensors",
            where=folder,
            cure="Pickled weights (.bin, .pt) are never loaded: convert them to safetensors.",
        )
    return dict.fromkeys(paths)


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError("has no weight_map", where=index)
    promises: dict[Path, set[str] | None] = {}
    for name, shard in weight_map.items():
        if not name.isprintable():
            raise FileFormatError(f"lists the impossible name {name!r}", where=index)
        is_name = isinstance(shard, str) and shard.isprintable() and not set(shard) & set("/\\")
        if not is_name or not shard.endswith(".safetensors"):
            raise FileFormatError(f"names a shard {shard!r} outside its folder", where=index)
        promises.setdefault(index.parent / shard, set()).add(name)
    return dict(sorted(promises.items()))


def read_weights(folder: str | Path) -> dict[str, mx.array]:
    """Read a model folder's safetensors: sharded by index, or every `model*.safetensors`.

    Raises:
        FileFormatError: a shard is missing or malformed, lacks a tensor that the index promises,
            or holds one that the index does not list there.
        SourceError: the folder holds no safetensors.
    """
    tensors: dict[str, mx.array] = {}
    for path, promised in weight_files(folder).items():
        if not os.path.lexists(path):
            raise FileFormatError(
                f"shard {path.name} is missing", where=folder, cure="Fetch it again."
            )
        content = read_safetensors(path)
        twice = sorted(content.keys() & tensors.keys())
        if twice:
            raise FileFormatError(f"{twice[0]} is in more than one file", where=path)
        if promised is not None and promised != content.keys():
            name = min(promised ^ content.keys())
            verb = "lacks" if name in promised else "holds"
            which = "which the index promises" if name in promised else "not listed in the index"
            raise FileFormatError(f"{verb} {name}, {which}", where=path)
        tensors.update(content)
    return tensors


def write_safetensors(
    path: str | Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays as one safetensors file, whole or not at all."""
    tensors = {name: mx.contiguous(array) for name, array in tensors.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        mx.save_safetensors(file, tensors, {"format": "mlx", **(metadata or {})})
