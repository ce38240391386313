"""What suites found: scores with intervals, thresholds, and every answer."""

from __future__ import annotations

import dataclasses
import html
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from workbench.evaluation import report_html
from workbench.evaluation.intervals import sign_test, wilson
from workbench.evaluation.suites import Suite
from workbench.models.files import replacing, write_json

VERSION = 1  # of report.json
POOLED = "all suites"


@dataclass(frozen=True)
class RowResult:
    """An answer and its score; and, in a comparison, the baseline's."""

    suite: str
    id: str
    kind: str
    prompt: str
    answer: str
    score: float  # in [0, 1]
    note: str  # why
    base_answer: str | None = None
    base_score: float | None = None
    base_note: str | None = None


@dataclass(frozen=True)
class SuiteScore:
    """Mean score of a suite, or of all rows together."""

    name: str
    rows: int
    score: float  # mean over the rows, in [0, 1]
    low: float  # 95 % interval, Wilson's
    high: float
    threshold: float | None = None
    base_score: float | None = None
    base_low: float | None = None
    base_high: float | None = None
    better: int | None = None  # rows that score higher than the baseline
    worse: int | None = None
    p_value: float | None = None  # two-sided sign test of better against worse

    @property
    def passed(self) -> bool | None:
        """Whether the score reaches its threshold; None without one."""
        return None if self.threshold is None else self.score >= self.threshold

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.score:.2f} ({self.low:.2f} to {self.high:.2f}, {self.rows} rows)"
        )
        if self.base_score is not None:
            text += f", before {self.base_score:.2f}"
        if self.threshold is not None:
            text += f"; {'reaches' if self.passed else 'MISSES'} {self.threshold:g}"
        return text


@dataclass(frozen=True, repr=False)
class BehaviourReport:
    """Scores by suite and pooled; as a cell's last value, a table."""

    model: str
    baseline: str | None  # what it is compared with
    suites: tuple[Suite, ...]
    results: tuple[RowResult, ...]
    threshold: float | None  # of the pooled score
    created: float  # seconds since 1970

    @cached_property
    def suite_scores(self) -> tuple[SuiteScore, ...]:
        """One a suite, in order."""
        return tuple(
            score(suite.name, [r for r in self.results if r.suite == suite.name], suite.threshold)
            for suite in self.suites
        )

    @cached_property
    def pooled(self) -> SuiteScore:
        """All rows together, each with the same weight."""
        return score(POOLED, self.results, self.threshold)

    @property
    def passed(self) -> bool:
        """Whether no threshold is missed."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """Names of the suites that miss their threshold."""
        return [s.name for s in (*self.suite_scores, self.pooled) if s.passed is False]

    @property
    def scores(self) -> pd.DataFrame:
        """A row a suite, and one for all: the fields of `SuiteScore`, and `passed`."""
        every = [*self.suite_scores, self.pooled]
        table = pd.DataFrame([{**dataclasses.asdict(s), "passed": s.passed} for s in every])
        return table.set_index("name").dropna(axis="columns", how="all")

    @property
    def table(self) -> pd.DataFrame:
        """A row a prompt: the fields of `RowResult`."""
        return pd.DataFrame(self.results).dropna(axis="columns", how="all")

    def as_dict(self) -> dict[str, object]:
        """What report.json holds."""
        described = [
            {**_scores_dict(found), "description": suite.description}
            for suite, found in zip(self.suites, self.suite_scores)
        ]
        return {
            "version": VERSION,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.created)),
            "model": self.model,
            "baseline": self.baseline,
            "passed": self.passed,
            "pooled": _scores_dict(self.pooled),
            "suites": described,
            "rows": [dataclasses.asdict(result) for result in self.results],
        }

    def save(self, folder: str | os.PathLike) -> Path:
        """Write report.json and report.html, each whole or not at all; returns the folder.

        Raises:
            FileFormatError: they cannot be written; what was there before is intact.
        """
        folder = Path(folder)
        with replacing(folder / "report.html") as page:
            page.write_text(report_html.page(self), encoding="utf-8")
            write_json(folder / "report.json", self.as_dict())
        return folder

    def __str__(self) -> str:
        compared = f" against {self.baseline}" if self.baseline else ""
        lines = [f"{self.model}{compared}", *map(str, self.suite_scores), str(self.pooled)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.model)}</b></p>{report_html.scores_table(self)}"


def score(name: str, results: Sequence[RowResult], threshold: float | None) -> SuiteScore:
    """The mean of some rows' scores, its interval, and what changed against the baseline."""
    values = [result.score for result in results]
    mean = sum(values) / len(values)
    found = SuiteScore(name, len(values), mean, *wilson(mean, len(values)), threshold)
    before = [result.base_score for result in results]
    if None in before:
        return found
    base_mean = sum(before) / len(before)
    better = sum(now > then for now, then in zip(values, before))
    worse = sum(now < then for now, then in zip(values, before))
    low, high = wilson(base_mean, len(before))
    return dataclasses.replace(
        found,
        base_score=base_mean,
        base_low=low,
        base_high=high,
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
    )


def _scores_dict(found: SuiteScore) -> dict[str, object]:
    return {**dataclasses.asdict(found), "passed": found.passed}
