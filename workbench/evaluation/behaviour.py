"""Run behaviour suites: the model answers every row, with its adapter and without."""

from __future__ import annotations

import contextlib
import os
import reprlib
import time
from collections.abc import Callable, Iterable, Sequence

from workbench.errors import ConfigError, DataError, check_number, check_whole
from workbench.evaluation.choices import score_options
from workbench.evaluation.generation import encode_prompt, generate
from workbench.evaluation.report import POOLED, BehaviourReport, RowResult
from workbench.evaluation.suite_rows import ChoiceRow, SuiteRow
from workbench.evaluation.suites import Suite, read_suites
from workbench.models.loading import BaseModel

Source = str | os.PathLike  # of a file or a folder
Switch = Callable[[], contextlib.AbstractContextManager]  # while it is entered, the adapter is off
Answer = tuple[str, int | None]  # text, and the option chosen by likelihood


def evaluate_suites(
    base: BaseModel,
    source: Source | Suite | Sequence[Source | Suite],
    *,
    baseline: BaseModel | Switch | None = None,
    threshold: float | None = None,
    batch_size: int = 32,
) -> BehaviourReport:
    """Let a model answer every row of some suites, greedily, and score what it writes.

    What switches an adapter off comes as a parameter: adapters live above this room. See
    `tuning.comparison.run_suites`.

    Args:
        base: a loaded model.
        source: a suite's file, a folder of them, what `read_suites` gives, or a list of these.
        baseline: compare with another model; or with this one, while a context manager is entered.
        threshold: the mean score that is asked for over all suites, in [0, 1].
        batch_size: prompts that are decoded together.

    Raises:
        DataError: a row cannot be read or asked; names file and line.
        ConfigError: a setting is out of range, or the source is none.
    """
    check_whole("batch_size", batch_size, 1)
    _check_threshold(threshold)
    suites = _suites(source)
    rows = _rows(suites)
    compared = baseline if isinstance(baseline, BaseModel) else base
    for model in (base, compared):
        _check_prompts(model, [row for _, row in rows])
    started, label = time.time(), None
    answers = _answers(base, rows, batch_size)
    before: list[Answer | None] = [None] * len(rows)
    if baseline is not None:
        with contextlib.nullcontext() if compared is baseline else baseline():
            before = _answers(compared, rows, batch_size)
        label = compared.name if compared is baseline else "adapter off"
    results = [_result(*pair, *both) for pair, *both in zip(rows, answers, before)]
    return BehaviourReport(base.name, label, tuple(suites), tuple(results), threshold, started)


def _suites(source: object) -> list[Suite]:
    if isinstance(source, Suite):
        return [source]
    if isinstance(source, str | os.PathLike):
        return read_suites(source)
    if not isinstance(source, Iterable):
        raise ConfigError(
            f"suites must be a file, a folder or a list of them, got {reprlib.repr(source)}",
            cure="Give a .jsonl file, a folder, or what wb.read_suites gives.",
        )
    return [suite for part in source for suite in _suites(part)]


def _check_threshold(threshold: object) -> None:
    if threshold is not None:
        check_number("threshold", threshold, 0)
        if threshold > 1:
            raise ConfigError(f"threshold must be in [0, 1], got {threshold}")


def _rows(suites: Sequence[Suite]) -> list[tuple[Suite, SuiteRow]]:
    rows = [(suite, row) for suite in suites for row in suite.rows]
    if not rows:
        raise DataError("there are no rows to evaluate", cure="Give at least one suite.")
    if len({suite.name for suite in suites}) < len(suites):
        raise DataError(f"two suites share a name: {[suite.name for suite in suites]}")
    if POOLED in {suite.name for suite in suites}:
        raise DataError(f"a suite is called {POOLED!r}, as the pooled score is", cure="Rename it.")
    return rows


def _check_prompts(base: BaseModel, rows: Sequence[SuiteRow]) -> None:
    for row in rows:
        try:
            encode_prompt(base, row.question)
        except DataError as error:
            raise DataError(error.what, where=row.where, cure=error.cure) from None


def _answers(
    base: BaseModel, rows: Sequence[tuple[Suite, SuiteRow]], batch_size: int
) -> list[Answer]:
    texts: dict[int, str] = {}
    for limit in {suite.max_tokens for suite, _ in rows}:
        places = [n for n, (suite, _) in enumerate(rows) if suite.max_tokens == limit]
        prompts = [rows[place][1].question for place in places]
        written = generate(base, prompts, max_tokens=limit, batch_size=batch_size)
        texts.update(zip(places, written))
    return [(texts[place], _chosen(base, row)) for place, (_, row) in enumerate(rows)]


def _chosen(base: BaseModel, row: SuiteRow) -> int | None:
    if not isinstance(row, ChoiceRow) or not row.chooses:
        return None
    scores = score_options(base, row.question, row.options)
    return scores.likeliest if row.choose_by == "likelihood" else scores.likeliest_for_its_length


def _result(suite: Suite, row: SuiteRow, answer: Answer, before: Answer | None) -> RowResult:
    prompt = row.question
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in prompt)
    scores = [row.score(*given) for given in (answer, before) if given is not None]
    return RowResult(
        suite.name,
        row.id,
        row.kind,
        prompt,
        answer[0],
        scores[0].value,
        scores[0].note,
        *((before[0], scores[1].value, scores[1].note) if before else ()),
    )
