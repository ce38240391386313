"""Lines of a JSONL file become rows; whatever is wrong is named by file and line."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from workbench.errors import DataError, is_text
from workbench.models.regular_files import open_regular, parse_json

MAX_LINE_BYTES = 16_000_000  # a row of a million tokens has four
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"  # how such a file begins, whatever its name
PROVENANCE_RANGES = {"authority_weight": (0.0, 0.99), "provenance_entropy": (0.0, math.inf)}


def read_rows(
    path: str | Path, *, inside: str | Path | None = None
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (place, row) for each line of a JSONL file; blank lines are passed over.

    Args:
        path: the file.
        inside: the folder that links may not lead out of; None follows them anywhere.

    Raises:
        DataError: the file cannot be read, is no regular file, is empty, or a line is too long or
            not a JSON object in UTF-8; names the line.
    """
    path, found = Path(path), False
    with open_regular(path, inside=inside, kind=DataError) as lines:
        try:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
                if number == 1 and line.startswith(GZIP):
                    cure = "Unpack it; wb.stream_dataset reads training rows as they are packed."
                    raise DataError("is packed by gzip", where=path, cure=cure)
                if line.strip():
                    found = True
                    yield f"{path}:{number}", parse_row(line, f"{path}:{number}")
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=path) from None
    if not found:
        raise DataError("holds no rows", where=path, cure="Write one JSON object a line.")


def parse_row(line: bytes, where: str) -> dict[str, object]:
    """The JSON object of a line; raises DataError if it is too long or no such object."""
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"is longer than {MAX_LINE_BYTES} bytes", where=where, cure="Split it into rows."
        )
    try:
        row = parse_json(line.removeprefix(BYTE_ORDER_MARK), constants=False)
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 (byte {error.start} of the line)",
            where=where,
            cure="Save the file as UTF-8.",
        ) from None
    except ValueError as error:
        raise DataError(f"is not valid JSON ({error})", where=where) from None
    if not isinstance(row, dict):
        raise DataError(f"must be a JSON object, got {type(row).__name__}", where=where)
    return row


def text_of(row: Mapping[str, object], key: str, where: str) -> str:
    """A text of a row; raises DataError unless it is a string that UTF-8 can hold."""
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, got {type(value).__name__}", where=where)
    if not is_text(value):
        raise DataError(f"{key!r} holds half of a surrogate pair", where=where)
    return value


def provenance_of(row: Mapping[str, object], where: str) -> dict[str, float | None]:
    """A row's authority weight (0 to 0.99) and provenance entropy (bits, from 0), or None each.

    Raises:
        DataError: one of them is no number, not finite or out of its range; names row and key.
    """
    return {
        key: _number_of(row, key, lowest, highest, where)
        for key, (lowest, highest) in PROVENANCE_RANGES.items()
    }


def _number_of(
    row: Mapping[str, object], key: str, lowest: float, highest: float, where: str
) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if is_number(value) and value == float(np.float32(highest)):
        value = highest  # as a column of float32 holds it: 0.9900000095
    # The comparison refuses NaN, and a whole number that no float holds.
    if is_number(value) and lowest <= value <= min(highest, sys.float_info.max):
        return float(value)
    bounded = f"a number from {lowest:g} to {highest:g}"
    span = bounded if highest < math.inf else f"a finite number from {lowest:g}"
    raise DataError(
        f"{key!r} must be {span}, got {shown(value)}",
        where=where,
        cure="Leave it out, and add_provenance scores the text.",
    )


def is_number(value: object) -> bool:
    """Whether a value is a whole number or a float; True and False are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A number for a message, anything else by its type."""
    short = isinstance(value, float) or (is_number(value) and abs(value) < 10**15)
    return repr(value) if short else type(value).__name__
