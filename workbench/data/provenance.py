"""How much authority a document claims, and how varied its provenance is, by counted words.

The scores are a heuristic of an earlier system, kept by its formulas. They say what a text and its
metadata *mention*; whether the text is true or its sources exist, they cannot know.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from workbench.data.documents import document_of
from workbench.data.provenance_words import (
    MAX_CHARACTERS,
    ProvenanceWords,
    entropy_of_counts,
    read_words,
)
from workbench.data.row_sources import Rows, read_records
from workbench.data.rows import PROVENANCE_RANGES, provenance_of
from workbench.errors import ConfigError, DataError

MISSING = ("score", "refuse")
SHORT_CHARACTERS = 50  # a text of fewer is not judged: it gets SHORT, and nothing else
SHORT = {"authority_base": 0.5, "entropy_base": 3.0}
OLD, RECENT = 1970, 1995  # years: before OLD, from OLD and before RECENT, from RECENT on
LARGEST_AUTHORITY = PROVENANCE_RANGES["authority_weight"][1]


@dataclass(frozen=True)
class ProvenanceScore:
    """Authority and entropy of a document, term by term.

    authority_weight = Σ authority_*, provenance_entropy = Σ entropy_*; what is subtracted is
    negative, and a clamp is what brought the sum back into its range.
    """

    authority_base: float  # 0.3, or 0.5 of a short text
    authority_citations: float  # min(0.25, 0.05 · log₁₀(citations + 1))
    authority_institution: float  # largest mark of the institutions named, 0 to 0.35
    authority_consensus: float  # min(0.2, 0.1 · different consensus phrases)
    authority_age: float  # −0.15 before 1970, 0 before 1995 or unknown, else 0.15
    authority_primary: float  # −min(0.45, 0.15 · different marks of a primary source)
    authority_clamp: float  # brings the sum into 0 to 0.99
    entropy_base: float  # 5.5 before 1970, 3.5 before 1995, else or unknown 1.5; short text 3
    entropy_sources: float  # bits: Shannon entropy of the source types
    entropy_primary: float  # min(2, 0.5 · different marks of a primary source)
    entropy_variety: float  # min(1.5, 0.3 · different phrases that show another view)
    entropy_institution: float  # −1.5 · largest mark of the institutions
    entropy_consensus: float  # −min(1, 0.4 · different consensus phrases)
    entropy_clamp: float  # brings the sum up to 0
    authority_weight: float  # 0 to 0.99
    provenance_entropy: float  # from 0
    characters: int  # of the text
    characters_read: int  # the first of them; fewer than `characters` of a huge text

    def __str__(self) -> str:
        values = dataclasses.asdict(self)

        def terms(group: str) -> str:
            parts = ((k, v) for k, v in values.items() if k.startswith(f"{group}_") and v)
            return " ".join(
                f"{v:+.3g} {k.removeprefix(f'{group}_')}"
                for k, v in parts
                if k != "authority_weight"
            )

        read = f"; the first {self.characters_read} of {self.characters} characters were read"
        cut = read if self.characters_read < self.characters else ""
        return (
            f"authority {self.authority_weight:.3g} = {terms('authority')}; "
            f"entropy {self.provenance_entropy:.3g} = {terms('entropy')}{cut}"
        )


def score_document(
    document: str | Mapping[str, object],
    *,
    words: str | os.PathLike | ProvenanceWords | None = None,
) -> ProvenanceScore:
    """Score one document: a text, or a row; see `score_documents`, which gives the same numbers."""
    row = {"text": document} if isinstance(document, str) else document
    scores = _score(read_records([row]), read_words(words))
    return ProvenanceScore(**{name: column[0].item() for name, column in scores.items()})


def score_documents(
    documents: object, *, words: str | os.PathLike | ProvenanceWords | None = None
) -> pd.DataFrame:
    """Score every row of a frame or a list: one column a term of `ProvenanceScore`.

    Args:
        documents: rows as `document_of` reads them: of `text`, `prompt` and `completion`, or
            `messages`, and beside them, where known, `year`, `citations`, `institution` and
            `source_types`. Of a text the first MAX_CHARACTERS are read. An institution of the
            word list counts where the text or `institution` names it. Without `source_types`
            they are counted by the list's phrases in the text.
        words: a word file in place of the package's own, see `read_words`.

    Raises:
        DataError: a row has no text, or metadata of a wrong kind; names the row and the key.
        FileFormatError: the word file is malformed.
    """
    scores = pd.DataFrame(_score(read_records(documents), read_words(words)))
    return scores.set_axis(documents.index) if isinstance(documents, pd.DataFrame) else scores


def add_provenance(
    rows: object,
    *,
    missing: str = "score",
    words: str | os.PathLike | ProvenanceWords | None = None,
) -> pd.DataFrame | list[dict[str, object]]:
    """The rows with `authority_weight` and `provenance_entropy`, which a provenance loss needs.

    Args:
        rows: a pandas frame, which comes back as a frame, or a list of rows.
        missing: a row that lacks one of the two gets it from its text ("score"), or raises
            ("refuse"). Values that rows have are checked and kept.
        words: a word file in place of the package's own, see `read_words`.

    Raises:
        DataError: a value is out of range or, where that is refused, missing; or a row to be
            scored has no text; names the row and the key.
    """
    if isinstance(rows, str | os.PathLike | Mapping):
        raise DataError(
            f"add_provenance takes rows in memory, got {type(rows).__name__}",
            cure="Give a data frame or a list of rows; for files and splits there is "
            "load_dataset(…, provenance='score').",
        )
    values = _complete(read_records(rows), missing, words)
    if isinstance(rows, pd.DataFrame):
        return rows.assign(**{key: [own[key] for own in values] for key in PROVENANCE_RANGES})
    return [{**row, **own} for row, own in zip(rows, values)]


def with_provenance(
    rows: Rows, missing: str | None, words: str | os.PathLike | ProvenanceWords | None = None
) -> Rows:
    """`add_provenance` of rows that have their places with them; None leaves them as they are.

    Raises:
        ConfigError: there are words to score by, and nothing is to be scored.
    """
    if words is not None and missing != "score":
        what = f"words are for scoring, and provenance is {missing!r}"
        raise ConfigError(what, cure="Give provenance='score' with them.")
    if missing is None:
        return rows
    values = _complete(rows, missing, words)
    return [(where, {**row, **own}) for (where, row), own in zip(rows, values)]


def _complete(
    rows: Rows, missing: str, words: str | os.PathLike | ProvenanceWords | None = None
) -> list[dict[str, float]]:
    """Both values of each row, its own or scored."""
    if missing not in MISSING:
        raise ConfigError(f"provenance {missing!r:.50} is unknown", cure=f"Use one of {MISSING}.")
    known = [provenance_of(row, where) for where, row in rows]
    lacking = [number for number, own in enumerate(known) if None in own.values()]
    if lacking and missing == "refuse":
        first = lacking[0]
        key = next(key for key, value in known[first].items() if value is None)
        raise DataError(
            f"has no {key!r} ({len(lacking)} of {len(rows)} rows lack it or its like)",
            where=rows[first][0],
            cure="Write both values, or let them be scored: 'score'.",
        )
    scores = _score([rows[number] for number in lacking], read_words(words))
    for key in PROVENANCE_RANGES:
        for number, value in zip(lacking, scores[key].tolist()):
            if known[number][key] is None:
                known[number][key] = value
    return known


class _Measures(NamedTuple):
    """What the formulas are made of: numbers of one document, or (N,) arrays of many."""

    characters: float
    year: float  # NaN: unknown
    citations: float
    institution: float  # largest mark
    primary: float
    consensus: float
    variety: float
    source_bits: float


def _score(rows: Rows, words: ProvenanceWords) -> dict[str, np.ndarray]:
    """name → (N,) of every field of ProvenanceScore, in their order."""
    measured = [_measure(row, words, where) for where, row in rows]
    table = np.array(measured, dtype=np.float64).reshape(len(rows), len(_Measures._fields))
    columns = _Measures(*table.T)
    short = columns.characters < SHORT_CHARACTERS
    authority, entropy = (
        {name: np.where(short, SHORT.get(name, 0.0), column) for name, column in terms.items()}
        for terms in (_authority_terms(columns), _entropy_terms(columns))
    )
    weight = np.clip(sum(authority.values()), 0.0, LARGEST_AUTHORITY)
    bounded = np.maximum(sum(entropy.values()), 0.0)
    return {
        **authority,
        "authority_clamp": weight - sum(authority.values()),
        **entropy,
        "entropy_clamp": bounded - sum(entropy.values()),
        "authority_weight": weight,
        "provenance_entropy": bounded,
        "characters": columns.characters.astype(np.int64),
        "characters_read": np.minimum(columns.characters, MAX_CHARACTERS).astype(np.int64),
    }


def _authority_terms(of: _Measures) -> dict[str, np.ndarray]:
    return {
        "authority_base": np.full_like(of.year, 0.3),
        "authority_citations": np.minimum(0.25, 0.05 * np.log10(of.citations + 1)),
        "authority_institution": of.institution,
        "authority_consensus": np.minimum(0.2, 0.1 * of.consensus),
        "authority_age": np.select([of.year < OLD, of.year >= RECENT], [-0.15, 0.15], 0.0),
        "authority_primary": 0.0 - np.minimum(0.45, 0.15 * of.primary),
    }


def _entropy_terms(of: _Measures) -> dict[str, np.ndarray]:
    return {
        "entropy_base": np.select([of.year < OLD, of.year < RECENT], [5.5, 3.5], 1.5),
        "entropy_sources": of.source_bits,
        "entropy_primary": np.minimum(2.0, 0.5 * of.primary),
        "entropy_variety": np.minimum(1.5, 0.3 * of.variety),
        "entropy_institution": 0.0 - 1.5 * of.institution,
        "entropy_consensus": 0.0 - np.minimum(1.0, 0.4 * of.consensus),
    }


def _measure(row: Mapping[str, object], words: ProvenanceWords, where: str) -> _Measures:
    document = document_of(row, where)
    found, named = words.find(document.text), words.find(document.institution)
    counts = found.source_types if document.source_types is None else document.source_types
    return _Measures(
        characters=len(document.text),
        year=math.nan if document.year is None else document.year,
        citations=document.citations,
        institution=max(found.institution, named.institution),
        primary=found.primary,
        consensus=found.consensus,
        variety=found.variety,
        source_bits=entropy_of_counts(counts),
    )
