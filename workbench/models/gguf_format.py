"""Read GGUF, bounds-checked in Python: MLX's own parser can be killed by a malformed file.

The layout follows the GGUF specification (ggml, docs/gguf.md, versions 2 and 3).
The gguf package knows the block formats and turns them into float32.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from workbench.errors import FileFormatError
from workbench.models.regular_files import open_regular

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    10: "Q",
    11: "q",
    12: "d",
}
BOOL, STRING, ARRAY = 7, 8, 9
MAX_DIMS, MAX_KEY, MAX_NAME, MAX_ALIGNMENT = 4, 65_535, 1024, 1 << 20  # dimensions; bytes
MAX_DIM = 2**31 - 1  # MLX counts in int32
MAX_ENTRIES = 65_536  # of metadata, and of tensors
MAX_ITEMS = 4_000_000  # of an array; the largest vocabularies have 300 000
MAX_HEADER_BYTES = 256_000_000
UNQUANTISED = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F64: np.float64,
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file."""

    name: str
    shape: tuple[int, ...]  # row-major, as MLX has it; the file has the reverse
    kind: GGMLQuantizationType
    start: int  # byte offset in the file
    size: int  # bytes


class GGUFFile:
    """A GGUF file: metadata, and tensors that are read on request.

    Raises:
        FileFormatError: anything in the header is out of bounds.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open_regular(path) as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileFormatError:
            raise
        except (OSError, ValueError) as error:
            raise FileFormatError(f"cannot be read ({error})", where=path) from None
        self._position, self._limit = 0, min(len(self._buffer), MAX_HEADER_BYTES)
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise self._malformed(f"is truncated or malformed ({error})") from None

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32 (float16 stays float16), dequantised if it is in blocks.

        Raises:
            FileFormatError: nobody here knows how to dequantise its type.
        """
        tensor = self.tensors[name]
        if tensor.kind in UNQUANTISED:
            dtype = UNQUANTISED[tensor.kind]
            return self._bytes(tensor).view(dtype).reshape(tensor.shape)
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        rows = (*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
        try:
            return dequantize(self._bytes(tensor).reshape(rows), tensor.kind)
        except NotImplementedError:
            raise FileFormatError(
                f"tensor {name!r} has the type {tensor.kind.name}, which cannot be dequantised",
                where=self.path,
                cure="Use another quantisation of the model, such as Q8_0.",
            ) from None

    def _bytes(self, tensor: GGUFTensor) -> np.ndarray:
        return np.frombuffer(self._buffer, np.uint8, count=tensor.size, offset=tensor.start)

    def _malformed(self, what: str) -> FileFormatError:
        return FileFormatError(what, where=self.path, cure="Fetch the file again.")

    def _read_header(self) -> None:
        if self._buffer[:4] != b"GGUF":
            raise self._malformed("is not a GGUF file")
        self._position = 4
        version = self._number("I")
        if version not in (2, 3):
            raise self._malformed(f"has GGUF version {version}; 2 and 3 are supported")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        # The smallest entry takes 13 bytes and the smallest tensor 32: a count beyond is a lie.
        if 13 * num_entries + 32 * num_tensors > self._limit:
            raise self._malformed("promises more entries than it has room for")
        if max(num_entries, num_tensors) > MAX_ENTRIES:
            raise self._malformed(f"promises more than {MAX_ENTRIES} entries")
        for _ in range(num_entries):
            key = self._name(MAX_KEY)
            if key in self.metadata:
                raise self._malformed(f"has the key {key!r} twice")
            self.metadata[key] = self._value(self._number("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        self._place(infos)

    def _number(self, code: str) -> int | float:
        end = self._position + struct.calcsize("<" + code)
        if end > self._limit:
            raise self._malformed("is truncated")
        (value,) = struct.unpack_from("<" + code, self._buffer, self._position)
        self._position = end
        return value

    def _string(self, limit: int) -> str:
        length = self._number("Q")
        if length > min(limit, self._limit - self._position):
            raise self._malformed(f"has a string of {length} bytes, beyond its bounds")
        self._position += length
        return self._buffer[self._position - length : self._position].decode("utf-8")

    def _name(self, limit: int) -> str:
        # Names are shown in messages and tables: no control characters, no change of direction.
        name = self._string(limit)
        if not name or not name.isprintable():
            raise self._malformed(f"has the impossible name {name[:100]!r}")
        return name

    def _value(self, kind: int) -> object:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == BOOL:
            return self._bools(1)[0]
        if kind == STRING:
            return self._string(self._limit)
        if kind == ARRAY:
            return self._array()
        raise self._malformed(f"has a metadata value of unknown type {kind}")

    def _array(self) -> list[object]:
        kind, count = self._number("I"), self._number("Q")
        if kind not in SCALARS and kind not in (BOOL, STRING):
            raise self._malformed(f"has a metadata array of unsupported type {kind}")
        item_bytes = {BOOL: 1, STRING: 8}.get(kind) or struct.calcsize("<" + SCALARS[kind])
        if count > MAX_ITEMS or count * item_bytes > self._limit - self._position:
            raise self._malformed(f"has an array of {count} items, beyond its bounds")
        if kind == BOOL:
            return self._bools(count)
        if kind == STRING:
            return self._strings(count)
        values = struct.unpack_from(f"<{count}{SCALARS[kind]}", self._buffer, self._position)
        self._position += count * item_bytes
        return list(values)

    def _bools(self, count: int) -> list[bool]:
        values = self._buffer[self._position : self._position + count]
        if len(values) < count or values.strip(b"\0\1"):
            raise self._malformed("has a truth value that is neither 0 nor 1")
        self._position += count
        return [value == 1 for value in values]

    def _strings(self, count: int) -> list[str]:
        # A vocabulary has 100 000 of them: one local loop instead of a call each.
        strings, buffer, position = [], self._buffer, self._position
        read_length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = read_length(buffer, position)
            end = position + 8 + length
            if end > self._limit:
                raise self._malformed(f"has a string of {length} bytes, beyond its bounds")
            strings.append(buffer[position + 8 : end].decode("utf-8"))
            position = end
        self._position = position
        return strings

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._name(MAX_NAME), self._number("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._malformed(f"tensor {name!r} has {num_dims} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(num_dims)]))
        return name, shape, self._number("I"), self._number("Q")

    def _place(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Check that every tensor lies inside the file and on no other, and remember where."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment % 8:
            raise self._malformed(f"has an impossible alignment of {alignment!r}")
        data_start = position = -(-self._position // alignment) * alignment
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise self._malformed(f"has the tensor {name!r} twice")
            size, start = self._size(name, shape, kind), data_start + offset
            # As in llama.cpp's reader: in the order of their entries, with nothing between.
            if start != position:
                raise self._malformed(f"tensor {name!r} is not where the one before it ends")
            if start + size > len(self._buffer):
                raise self._malformed(f"tensor {name!r} lies outside the file")
            self.tensors[name] = GGUFTensor(name, shape, GGMLQuantizationType(kind), start, size)
            position = -(-(start + size) // alignment) * alignment
        if position < len(self._buffer):
            raise self._malformed(f"has {len(self._buffer) - position} bytes after its last tensor")

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        if kind not in set(GGMLQuantizationType):
            raise self._malformed(f"tensor {name!r} has the unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if min(shape) < 1 or max(shape) > MAX_DIM or shape[-1] % block:
            raise self._malformed(f"tensor {name!r} has the impossible shape {shape}")
        return math.prod(shape) // block * block_bytes
