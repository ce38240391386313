"""A row as a document: its text, and what its metadata say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.data.chats import check_messages
from workbench.data.rows import PROVENANCE_RANGES, is_number, shown, text_of
from workbench.errors import DataError

MAX_YEARS, MAX_CITATIONS, MAX_SOURCE_TYPES = 10_000, 10**12, 1_000


@dataclass(frozen=True)
class Document:
    """What of a row the provenance score reads."""

    text: str
    year: int | None  # of writing; None: unknown
    citations: int
    institution: str  # names of institutions, in words; "" if the metadata name none
    source_types: tuple[int, ...] | None  # sources of each type, ascending; None: not said


def document_of(row: Mapping[str, object], where: str) -> Document:
    """The document that a row holds.

    Args:
        row: `messages`, `prompt` and `completion`, or `text`: the form that comes first here, and
            all that it says. Beside it, each of these may be absent: `year` (whole number, of
            writing), `citations` (whole number from 0), `institution` (a text) and `source_types`
            (names of the kinds of source, one for each source: ["letter", "letter", "map"]).
        where: the row's place, for messages.

    Raises:
        DataError: no text, or metadata of a wrong kind; names the row and the key.
    """
    institution, types = row.get("institution"), row.get("source_types")
    return Document(
        text=_text(row, where),
        year=_whole(row, "year", -MAX_YEARS, MAX_YEARS, where),
        citations=_whole(row, "citations", 0, MAX_CITATIONS, where) or 0,
        institution="" if institution is None else text_of(row, "institution", where),
        source_types=None if types is None else _counted_types(types, where),
    )


def _text(row: Mapping[str, object], where: str) -> str:
    if "messages" in row:
        contents = (message.get("content") for message in check_messages(row["messages"], where))
        return "\n".join(content for content in contents if isinstance(content, str))
    if "prompt" in row or "completion" in row:
        return "\n".join(text_of(row, key, where) for key in ("prompt", "completion"))
    if "text" in row:
        return text_of(row, "text", where)
    raise DataError(
        "has no text to be scored",
        where=where,
        cure="Use 'text', 'prompt' and 'completion', or 'messages'; or write both "
        f"{' and '.join(map(repr, PROVENANCE_RANGES))}.",
    )


def _whole(
    row: Mapping[str, object], key: str, lowest: int, highest: int, where: str
) -> int | None:
    """A whole number of the metadata, which a frame with gaps gives as a float."""
    value = row.get(key)
    if value is None:
        return None
    if is_number(value) and lowest <= value <= highest and value == int(value):
        return int(value)
    raise DataError(
        f"{key!r} must be a whole number from {lowest} to {highest}, got {shown(value)}",
        where=where,
        cure=f"Leave it out where the {key} is unknown." if key == "year" else "",
    )


def _counted_types(names: object, where: str) -> tuple[int, ...]:
    good = isinstance(names, list) and len(names) <= MAX_SOURCE_TYPES
    if not good or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(
            f"'source_types' must be a list of at most {MAX_SOURCE_TYPES} names",
            where=where,
            cure='Give one name for each source, as ["letter", "letter", "map"].',
        )
    return tuple(sorted(Counter(name.strip().casefold() for name in names).values()))
