"""What became of every tensor when weights were loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import pandas as pd

from workbench.errors import WeightsError

LOADED, MISSING, UNEXPECTED, IGNORED = "loaded", "missing", "unexpected", "ignored"
WRONG_SHAPE, WRONG_DTYPE = "wrong shape", "wrong dtype"
PROBLEMS = (MISSING, UNEXPECTED, WRONG_SHAPE, WRONG_DTYPE)
NAMED_IN_ERROR = 5  # tensors that an error lists by name


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the file or parameter of the network."""

    name: str
    status: str
    expected_shape: tuple[int, ...] | None = None
    file_shape: tuple[int, ...] | None = None
    file_dtype: str = ""
    dtype: str = ""  # in memory
    num_bytes: int = 0  # in memory

    def describe(self) -> str:
        """The name, and what is wrong with it."""
        if self.status == WRONG_SHAPE:
            return f"{self.name} (file {self.file_shape}, network {self.expected_shape})"
        return f"{self.name} ({self.file_dtype})" if self.status == WRONG_DTYPE else self.name


@dataclass(frozen=True, repr=False)
class LoadReport:
    """Every tensor: loaded, missing, unexpected, ignored, or of the wrong shape or dtype."""

    records: list[TensorRecord]
    source: str = ""
    notes: list[str] = field(default_factory=list)  # such as "dequantised to float32"

    def names(self, status: str) -> list[str]:
        """Names with that status, in order."""
        return [record.name for record in self.records if record.status == status]

    @property
    def loaded(self) -> list[str]:
        """Names of the parameters that the file filled."""
        return self.names(LOADED)

    @property
    def missing(self) -> list[str]:
        """Names of the parameters that the file does not have."""
        return self.names(MISSING)

    @property
    def unexpected(self) -> list[str]:
        """Names in the file that the network does not have."""
        return self.names(UNEXPECTED)

    @property
    def mismatched(self) -> list[str]:
        """Names whose shape or dtype does not fit."""
        return self.names(WRONG_SHAPE) + self.names(WRONG_DTYPE)

    @property
    def complete(self) -> bool:
        """Whether every parameter was filled and nothing was left over."""
        return not any(record.status in PROBLEMS for record in self.records)

    @property
    def total_bytes(self) -> int:
        """Bytes of the loaded parameters in memory."""
        return sum(record.num_bytes for record in self.records)

    def require_complete(self) -> None:
        """Raise WeightsError naming what is wrong, unless complete."""
        if self.complete:
            return
        parts = []
        for status in PROBLEMS:
            found = [record for record in self.records if record.status == status]
            if found:
                named = ", ".join(record.describe() for record in found[:NAMED_IN_ERROR])
                more = ", …" if len(found) > NAMED_IN_ERROR else ""
                parts.append(f"{len(found)} {status}: {named}{more}")
        raise WeightsError(
            "; ".join(parts),
            where=self.source,
            cure="The weights are for another model, or incomplete; strict=False loads what fits.",
        )

    def table(self) -> pd.DataFrame:
        """One row a tensor."""
        rows = [vars(record) for record in self.records]
        return pd.DataFrame(rows, columns=list(TensorRecord.__dataclass_fields__))

    def __str__(self) -> str:
        counts = {status: len(self.names(status)) for status in (LOADED, *PROBLEMS, IGNORED)}
        shown = [f"{n} {status}" for status, n in counts.items() if n or status == LOADED]
        verdict = "complete" if self.complete else "NOT complete"
        size = f"{self.total_bytes / 1e6:.1f} MB"
        return "; ".join([f"{verdict}: {', '.join(shown)}, {size} in memory", *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        body = self.table().to_html(escape=True, index=False, max_rows=None, border=0)
        summary = html.escape(str(self))
        scroll = "max-height:20em;overflow:auto"
        return f"<details><summary>{summary}</summary><div style='{scroll}'>{body}</div></details>"


def compare(
    expected: Mapping[str, mx.array],
    found: Mapping[str, mx.array],
    *,
    source: str = "",
    ignorable: Callable[[str], bool] = lambda name: False,
    file_dtypes: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
    same_dtype: bool = False,
) -> LoadReport:
    """Compare a network's parameters with a file's tensors, by name, shape and dtype.

    Args:
        expected: the network's parameters by name.
        found: the tensors that would fill them.
        source: the file or folder, for messages.
        ignorable: whether an unexpected name is known to be harmless.
        file_dtypes: dtype names as the file has them, where `found` was converted.
        same_dtype: whether the very dtype must agree, or only its kind (floating or not).
    """
    file_dtypes = file_dtypes or {}
    records = []
    for name, parameter in expected.items():
        tensor = found.get(name)
        if tensor is None:
            records.append(TensorRecord(name, MISSING, tuple(parameter.shape)))
        else:
            status = _status(parameter, tensor, same_dtype)
            file_dtype = file_dtypes.get(name, _dtype_name(tensor))
            records.append(_record(name, status, tuple(parameter.shape), tensor, file_dtype))
    for name in sorted(found.keys() - expected.keys()):
        status = IGNORED if ignorable(name) else UNEXPECTED
        file_dtype = file_dtypes.get(name, _dtype_name(found[name]))
        records.append(_record(name, status, None, found[name], file_dtype))
    return LoadReport(records, source, notes or [])


def _record(
    name: str, status: str, expected: tuple[int, ...] | None, tensor: mx.array, file_dtype: str
) -> TensorRecord:
    shape, loaded = tuple(tensor.shape), status == LOADED
    dtype, num_bytes = (_dtype_name(tensor), tensor.nbytes) if loaded else ("", 0)
    return TensorRecord(name, status, expected, shape, file_dtype, dtype, num_bytes)


def _status(parameter: mx.array, tensor: mx.array, same_dtype: bool) -> str:
    if parameter.shape != tensor.shape:
        return WRONG_SHAPE
    if same_dtype:
        return LOADED if parameter.dtype == tensor.dtype else WRONG_DTYPE
    floating = [mx.issubdtype(array.dtype, mx.floating) for array in (parameter, tensor)]
    return LOADED if floating[0] == floating[1] else WRONG_DTYPE


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
