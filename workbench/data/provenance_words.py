"""The word lists of the provenance score, and how whole words and phrases are found in a text."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from workbench.data.rows import is_number
from workbench.errors import ConfigError, FileFormatError
from workbench.models.files import read_json
from workbench.models.regular_files import check_regular

MAX_FILE_BYTES = 1_000_000
MAX_PHRASES = 5_000  # of all lists: each that begins with a word of the text is looked for
MAX_PHRASE_CHARACTERS = 100
LARGEST_MARK = 0.35
MAX_CHARACTERS = 100_000  # of a text, from its start, that are read: bounded work a document

LISTS = ("primary_sources", "consensus", "variety")  # of phrases
KEYS = ("institutions", "source_types", *LISTS)
# Letters and digits are words; a mark that ends a clause parts what stands on its two sides, so
# that no phrase runs across it. Hyphens, apostrophes, quotes and white space only separate.
TOKEN = re.compile(r"[^\W_]+|[.,;:!?()\[\]]")


@dataclass(frozen=True)
class WordsFound:
    """What a text holds of the word lists."""

    institution: float  # largest mark of the institutions named, 0 to 0.35
    primary: int  # different marks of a primary source
    consensus: int  # different phrases that claim a consensus
    variety: int  # different phrases that show more than one view
    source_types: tuple[int, ...]  # how often each type of source is named, ascending, none 0


@dataclass(frozen=True, eq=False)
class ProvenanceWords:
    """Word lists, ready to be looked for; made by `read_words`."""

    by_first_word: Mapping[str, tuple[tuple[str, str, object], ...]]  # (phrase, list, value)

    def find(self, text: str) -> WordsFound:
        """What the first MAX_CHARACTERS of a text hold; a word that is cut there does not count.

        Upper and lower case are one, and a phrase matches whole words only: "who" is not in
        "whole". Words are what blanks and punctuation part, so texts in scripts that set no
        blanks find nothing.
        """
        tokens = _tokens(text)
        line = _line(tokens)
        marks, found, types = [0.0], Counter(), Counter()
        for word in self.by_first_word.keys() & set(tokens):
            for phrase, kind, value in self.by_first_word[word]:
                if phrase not in line:
                    continue
                if kind == "institutions":
                    marks.append(value)
                elif kind == "source_types":
                    types[value] += line.count(phrase)
                else:
                    found[kind] += 1
        return WordsFound(
            max(marks), *(found[kind] for kind in LISTS), tuple(sorted(types.values()))
        )


def read_words(words: str | os.PathLike | ProvenanceWords | None = None) -> ProvenanceWords:
    """Read the word lists of the provenance score.

    Args:
        words: a JSON file; None for the package's own. It holds `institutions`, an object of
            phrases and their marks from 0 to 0.35; `source_types`, an object of types and the list
            of phrases that name each; and the lists of phrases `primary_sources`, `consensus` and
            `variety`.

    Raises:
        FileFormatError: absent, too large, no JSON, or a list is malformed; names the key.
        ConfigError: `words` is no path.
    """
    if words is None:
        return _own_words()
    if isinstance(words, ProvenanceWords):
        return words
    if not isinstance(words, str | os.PathLike):
        raise ConfigError(
            f"words must be a file's path, got {type(words).__name__}",
            cure=f"Write a JSON file with {', '.join(KEYS)}.",
        )
    path = Path(os.path.expanduser(words))
    if check_regular(path) > MAX_FILE_BYTES:
        raise FileFormatError(f"is larger than {MAX_FILE_BYTES} bytes", where=path)
    return _index(read_json(path), path)


@functools.cache
def _own_words() -> ProvenanceWords:
    file = resources.files("workbench.data").joinpath("provenance_words.json")
    return _index(json.loads(file.read_bytes()), Path(file.name))


def _index(content: Mapping[str, object], path: Path) -> ProvenanceWords:
    if set(content) != set(KEYS):
        odd = min(set(content) ^ set(KEYS))
        raise FileFormatError(
            f"{'has no' if odd in KEYS else 'has the unknown'} key {odd[:50]!r}",
            where=path,
            cure=f"A word file has {', '.join(KEYS)}; a list may be empty.",
        )
    index: dict[str, list[tuple[str, str, object]]] = {}
    seen: dict[tuple[str, str], str] = {}
    for kind, spelled, value in _entries(content, path):
        tokens = _phrase_tokens(spelled, f"{path}: {kind}")
        phrase = _line(tokens)
        if (kind, phrase) in seen:
            raise FileFormatError(
                f"holds {spelled!r} and {seen[kind, phrase]!r}, which are the same words",
                where=f"{path}: {kind}",
                cure="Keep one of them.",
            )
        seen[kind, phrase] = spelled
        if len(seen) > MAX_PHRASES:
            raise FileFormatError(f"has more than {MAX_PHRASES} phrases", where=path)
        index.setdefault(tokens[0], []).append((phrase, kind, value))
    return ProvenanceWords({word: tuple(entries) for word, entries in index.items()})


def _entries(content: Mapping[str, object], path: Path) -> Iterator[tuple[str, object, object]]:
    """(list, phrase, value) of all lists; the value is a mark or the name of a source type."""
    for phrase, mark in _typed(content, "institutions", dict, path).items():
        if not is_number(mark) or not 0 <= mark <= LARGEST_MARK:  # NaN is not either
            raise FileFormatError(
                f"the mark of {phrase[:MAX_PHRASE_CHARACTERS]!r} must be a number from 0 to "
                f"{LARGEST_MARK}",
                where=f"{path}: institutions",
            )
        yield "institutions", phrase, float(mark)
    types = _typed(content, "source_types", dict, path)
    for name in types:
        place = f"source_types, {name[:MAX_PHRASE_CHARACTERS]!r}"
        yield from (("source_types", p, name) for p in _typed(types, name, list, path, place))
    for kind in LISTS:
        yield from ((kind, phrase, None) for phrase in _typed(content, kind, list, path))


def _typed(
    content: Mapping[str, object], key: str, kind: type, path: Path, place: str = ""
) -> object:
    value = content[key]
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list of phrases"
        raise FileFormatError(
            f"must be {expected}, got {type(value).__name__}", where=f"{path}: {place or key}"
        )
    return value


def _phrase_tokens(phrase: object, where: str) -> list[str]:
    if not isinstance(phrase, str):
        raise FileFormatError(f"a phrase must be a text, got {type(phrase).__name__}", where=where)
    tokens = _tokens(phrase) if len(phrase) <= MAX_PHRASE_CHARACTERS else []
    if not tokens or not tokens[0].isalnum():
        raise FileFormatError(
            f"the phrase {phrase[:MAX_PHRASE_CHARACTERS]!r} must begin with a word and have at "
            f"most {MAX_PHRASE_CHARACTERS} characters",
            where=where,
        )
    return tokens


def _tokens(text: str) -> list[str]:
    """Words and clause marks of a text's beginning, in one case and one spelling of accents."""
    start = text[:MAX_CHARACTERS]
    plain = start if start.isascii() else unicodedata.normalize("NFC", start)
    tokens = TOKEN.findall(plain.casefold())
    if tokens and start[-1].isalnum() and _goes_on(text[MAX_CHARACTERS : MAX_CHARACTERS + 1]):
        tokens.pop()  # "who|le"
    return tokens


def _goes_on(following: str) -> bool:
    return following.isalnum() or (following != "" and unicodedata.combining(following) > 0)


def _line(tokens: list[str]) -> str:
    # Blanks of its own on both sides of each word: repeated words share none.
    return f" {'  '.join(tokens)} "


def entropy_of_counts(counts: tuple[int, ...]) -> float:
    """Shannon entropy, in bits, of how often each type occurs; 0 of none.

    −Σ p log₂ p with p = count / sum (Shannon 1948, section 6).
    """
    total = sum(counts)
    return sum(-count / total * math.log2(count / total) for count in counts) + 0.0
