"""Read and write files of tensors: validated before MLX sees them, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from workbench.errors import FileFormatError, SourceError

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
    """Read a JSON object.

    Raises:
        FileFormatError: absent, too large, not UTF-8, not JSON, or not an object.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"larger than {MAX_JSON_BYTES} bytes", where=path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", where=path) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileFormatError):
            raise
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
    """Read one safetensors file, after the safetensors package has validated its header.

    Returns:
        name → array, in the file's dtypes.

    Raises:
        FileFormatError: absent, truncated, or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError("no such file", where=path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
        tensors = mx.load(str(path), format="safetensors")
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise FileFormatError(
            f"is not a whole safetensors file ({error})",
            where=path,
            cure="Fetch it again; a git-lfs pointer or a broken download looks like this.",
        ) from None
    if set(tensors) != names:
        raise FileFormatError("holds tensors that cannot be read", where=path)
    return tensors


def read_weights(folder: str | Path) -> dict[str, mx.array]:
    """Read a model folder's safetensors: sharded by index, or every `model*.safetensors`.

    Raises:
        FileFormatError: a shard is missing, malformed, or lacks a tensor that the index promises.
        SourceError: the folder holds no safetensors.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        return _read_sharded(folder)
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("weights*.safetensors"))
    if not paths:
        raise SourceError(
            "holds no model*.safetensors",
            where=folder,
            cure="Pickled weights (.bin, .pt) are never loaded: convert them to safetensors.",
        )
    tensors: dict[str, mx.array] = {}
    for path in paths:
        _add(tensors, read_safetensors(path), path)
    return tensors


def _add(tensors: dict[str, mx.array], part: Mapping[str, mx.array], path: Path) -> None:
    twice = sorted(set(part) & set(tensors))
    if twice:
        raise FileFormatError(f"{twice[0]} is in more than one file", where=path)
    tensors.update(part)


def _read_sharded(folder: Path) -> dict[str, mx.array]:
    index = folder / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError("has no weight_map", where=index)
    tensors: dict[str, mx.array] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise FileFormatError(f"names a shard {shard!r} outside its folder", where=index)
        if not (folder / shard).is_file():
            raise FileFormatError(f"shard {shard} is missing", where=folder, cure="Fetch it again.")
        promised = {name for name, place in weight_map.items() if place == shard}
        content = read_safetensors(folder / shard)
        absent = sorted(promised - set(content))
        if absent:
            raise FileFormatError(
                f"lacks {absent[0]}, which the index promises", where=folder / shard
            )
        _add(tensors, content, folder / shard)
    return tensors


def write_safetensors(
    path: str | Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays as one safetensors file, whole or not at all."""
    tensors = {name: mx.contiguous(array) for name, array in tensors.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        mx.save_safetensors(file, tensors, {"format": "mlx", **(metadata or {})})
