"""Behaviour suites: JSONL files of prompts whose answers are scored.

A file is a suite. Its first line may describe it, and set what holds for all its rows:

    {"suite": "name", "description": "…", "threshold": 0.8, "max_tokens": 64,
     "refusal_phrases": ["…"], "choose_by": "text", "list_options": true}

Every other line is a row of one of three kinds, each with an `id` of its own and a `prompt` (a
question, or a list of messages):

    {"id": "…", "kind": "refusal", "prompt": "…", "expect": "refuse"}
    {"id": "…", "kind": "choice", "prompt": "…", "options": ["…", "…"], "answer": "…"}
    {"id": "…", "kind": "free", "prompt": "…", "indicators": ["…"], "anti_patterns": ["…"]}

`expect` is refuse or answer. A choice may have `reason` (indicators) and `reason_weight`, and its
own `choose_by`: text (the answer begins with the option), likelihood, or likelihood_for_length. An
indicator is a phrase, a list of wordings of which one is enough, or {"any": […], "weight": 2}.
Phrases are found as whole words without regard to case, accents and punctuation; they are no
patterns. How each kind is scored: `suite_rows`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from workbench.data.chats import check_messages
from workbench.data.rows import read_rows, text_of
from workbench.errors import DataError
from workbench.evaluation.prompts import Prompt
from workbench.evaluation.scoring import normalise
from workbench.evaluation.suite_rows import (
    CHOOSE_BY,
    ChoiceRow,
    FreeRow,
    Phrase,
    RefusalRow,
    SuiteRow,
)

MAX_ANSWER_TOKENS = 4096
HEAD = ("suite", "description", "threshold", "max_tokens")
HEAD += ("refusal_phrases", "choose_by", "list_options")
FIELDS = {
    "refusal": ("expect",),
    "choice": ("options", "answer", "reason", "reason_weight", "choose_by", "list_options"),
    "free": ("indicators", "anti_patterns"),
}
Row = Mapping[str, object]


@dataclass(frozen=True)
class Suite:
    """Rows that are scored together."""

    name: str
    rows: tuple[SuiteRow, ...]
    description: str = ""
    threshold: float | None = None  # the mean score that is asked for, in [0, 1]
    max_tokens: int = 64  # of an answer


def read_suites(source: str | os.PathLike) -> list[Suite]:
    """Read a suite, or every .jsonl of a folder.

    Raises:
        DataError: nothing there, or a row that cannot be scored; names file, line and cure.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        files = sorted(file for file in path.iterdir() if file.suffix == ".jsonl")
        suites = [read_suite(file, inside=path) for file in files]
    elif os.path.lexists(path):
        files, suites = [path], [read_suite(path)]
    else:
        raise DataError("no such suite", where=path, cure="Give a .jsonl file, or a folder.")
    if not suites:
        raise DataError("holds no .jsonl file", where=path)
    names = [suite.name for suite in suites]
    for file, name in zip(files, names):
        if names.count(name) > 1:
            raise DataError(f"another suite is called {name!r} too", where=file)
    return suites


def read_suite(path: str | os.PathLike, *, inside: str | os.PathLike | None = None) -> Suite:
    """Read one file; raises as `read_suites`."""
    head, shared, rows, first = {}, {}, [], {}
    for number, (where, row) in enumerate(read_rows(path, inside=inside)):
        if number == 0 and "suite" in row:
            head, shared = _head(row, where)
            continue
        read = _row(row, shared, where)
        if read.id in first:
            raise DataError(f"has the id {read.id!r} of {first[read.id]}", where=where)
        first[read.id] = where
        rows.append(read)
    if not rows:
        raise DataError("holds no rows beside its description", where=path)
    return Suite(**{"name": Path(path).stem, **head}, rows=tuple(rows))


def _head(row: Row, where: str) -> tuple[dict[str, object], dict[str, object]]:
    """What a first line says of the suite, and what it says of the suite's rows."""
    _only(row, HEAD, where)
    head: dict[str, object] = {"name": _words(row, "suite", where)}
    if "description" in row:
        head["description"] = text_of(row, "description", where)
    if "threshold" in row:
        head["threshold"] = _number(row, "threshold", where, 0, 1)
    if "max_tokens" in row:
        limit = row["max_tokens"]
        if type(limit) is not int or not 1 <= limit <= MAX_ANSWER_TOKENS:
            raise DataError(
                f"'max_tokens' must be a whole number from 1 to {MAX_ANSWER_TOKENS}, got {limit!r}",
                where=where,
            )
        head["max_tokens"] = limit
    shared = {key: row[key] for key in ("choose_by", "list_options") if key in row}
    _choosing(shared, where)
    if "refusal_phrases" in row:
        shared["phrases"] = _texts(row, "refusal_phrases", where)
    return head, shared


def _row(row: Row, shared: Row, where: str) -> SuiteRow:
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise DataError(
            f"unknown kind {repr(kind)[:100]}", where=where, cure=f"Kinds are: {', '.join(FIELDS)}."
        )
    _only(row, ("id", "kind", "prompt", *FIELDS[kind]), where)
    known = {"id": _words(row, "id", where), "prompt": _prompt(row, where), "where": where}
    if kind == "refusal":
        expect = row.get("expect")
        if expect not in ("refuse", "answer"):
            raise DataError(f"'expect' must be refuse or answer, got {expect!r}", where=where)
        must_refuse = expect == "refuse"
        return RefusalRow(**known, must_refuse=must_refuse, phrases=shared.get("phrases"))
    if kind == "choice":
        return _choice(row, shared, known, where)
    found = {key: _phrases(row, key, where) for key in FIELDS["free"] if key in row}
    if not found:
        raise DataError("needs 'indicators' or 'anti_patterns', or both", where=where)
    return FreeRow(**known, **found)


def _choice(row: Row, shared: Row, known: dict[str, object], where: str) -> ChoiceRow:
    options = _texts(row, "options", where)
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise DataError(f"'options' must be 2 to 26 texts, got {len(options)}", where=where)
    answer = text_of(row, "answer", where)
    if answer not in options:
        raise DataError(f"'answer' {answer!r} is none of the options", where=where)
    settings = {key: row.get(key, shared.get(key)) for key in ("choose_by", "list_options")}
    settings = {key: value for key, value in settings.items() if value is not None}
    _choosing(settings, where)
    if "reason" in row:
        settings["reason"] = _phrases(row, "reason", where)
    if "reason_weight" in row:
        if "reason" not in row:
            raise DataError("has a 'reason_weight' and no 'reason'", where=where)
        settings["reason_weight"] = _number(row, "reason_weight", where, 0, 1)
    return ChoiceRow(**known, options=options, answer=options.index(answer), **settings)


def _choosing(settings: Row, where: str) -> None:
    choose_by = settings.get("choose_by", CHOOSE_BY[0])
    if choose_by not in CHOOSE_BY:
        raise DataError(f"'choose_by' must be one of {CHOOSE_BY}, got {choose_by!r}", where=where)
    if not isinstance(settings.get("list_options", True), bool):
        raise DataError("'list_options' must be true or false", where=where)


def _prompt(row: Row, where: str) -> Prompt:
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return _words(row, "prompt", where)
    messages = check_messages(prompt, where)
    if messages[-1]["role"] != "user":
        raise DataError("the last message of 'prompt' must be the user's", where=where)
    return messages


def _only(row: Row, allowed: Sequence[str], where: str) -> None:
    unknown = sorted(row.keys() - set(allowed))
    if unknown:
        raise DataError(
            f"unknown field {unknown[0][:100]!r}",
            where=where,
            cure=f"There are: {', '.join(allowed)}.",
        )


def _words(row: Row, key: str, where: str) -> str:
    text = text_of(row, key, where)
    if not text.strip():
        raise DataError(f"{key!r} is empty", where=where)
    return text


def _number(row: Row, key: str, where: str, low: float, high: float) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise DataError(
            f"{key!r} must be a number from {low:g} to {high:g}, got {value!r}", where=where
        )
    return float(value)


def _texts(row: Row, key: str, where: str) -> tuple[str, ...]:
    """A list of texts that differ in their words, of which each has some."""
    values = row.get(key)
    if not isinstance(values, list) or not values:
        raise DataError(f"{key!r} must be a list that is not empty", where=where)
    seen: dict[str, object] = {}
    for value in values:
        words = normalise(text_of({key: value}, key, where))
        if not words:
            raise DataError(f"{key!r} holds {value!r}, which has no words", where=where)
        if words in seen:
            raise DataError(
                f"{key!r} holds {value!r} and {seen[words]!r}, the same words", where=where
            )
        seen[words] = value
    return tuple(values)


def _phrases(row: Row, key: str, where: str) -> tuple[Phrase, ...]:
    values = row[key]
    if not isinstance(values, list) or not values:
        raise DataError(f"{key!r} must be a list that is not empty", where=where)
    phrases = []
    for value in values:
        if isinstance(value, dict):
            _only(value, ("any", "weight"), where)
            wordings, weight = _texts(value, "any", where), 1.0
            if "weight" in value:
                weight = _number(value, "weight", where, 0, 1e6)
            if weight == 0:
                raise DataError(f"a 'weight' of 0 in {key!r} has no effect", where=where)
            phrases.append(Phrase(wordings, weight))
        else:
            wordings = value if isinstance(value, list) else [value]
            phrases.append(Phrase(_texts({key: wordings}, key, where)))
    return tuple(phrases)
