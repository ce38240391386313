"""What a check found, and how a person reads it."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass

import pandas as pd

PASSED, FAILED, NOT_APPLICABLE = "ok", "FAILED", "not applicable"
MARKS = {PASSED: "✓", FAILED: "✗", NOT_APPLICABLE: "–"}
COLORS = {PASSED: "#2a9d8f", FAILED: "#e05260", NOT_APPLICABLE: "#7d8590"}
WIDTH = 100  # columns of the text table


@dataclass(frozen=True)
class Finding:
    """One property that holds, does not hold, or does not apply."""

    check: str  # heading, such as "causality"
    status: str  # "ok", "FAILED" or "not applicable"
    detail: str  # the place and the numbers; or why it does not apply
    cause: str = ""  # of a failure: the likely cause, and what to look at

    def __str__(self) -> str:
        cause = f" → {self.cause}" if self.cause else ""
        return f"{MARKS[self.status]} {self.check}: {self.detail}{cause}"


def passed(check: str, detail: str) -> Finding:
    """A property that holds."""
    return Finding(check, PASSED, detail)


def failed(check: str, detail: str, cause: str) -> Finding:
    """A property that does not hold, with its likely cause."""
    return Finding(check, FAILED, detail, cause)


def not_applicable(check: str, reason: str) -> Finding:
    """A property that this model or training does not have, with the reason."""
    return Finding(check, NOT_APPLICABLE, reason)


@dataclass(frozen=True, repr=False)
class CheckReport:
    """All findings of a check. `.ok` if nothing failed; `.failures` lists what did."""

    subject: str  # what was checked
    findings: tuple[Finding, ...]
    seconds: float  # that the checks took

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """Findings of properties that do not hold, in order."""
        return [finding for finding in self.findings if finding.status == FAILED]

    @property
    def failed_checks(self) -> set[str]:
        """Headings under which something failed."""
        return {finding.check for finding in self.failures}

    def status(self, check: str) -> str | None:
        """The worst status under a heading; None if it is not in the report."""
        found = {finding.status for finding in self.findings if finding.check == check}
        return next((s for s in (FAILED, PASSED, NOT_APPLICABLE) if s in found), None)

    def table(self) -> pd.DataFrame:
        """One row a finding: check, status, detail, cause."""
        return pd.DataFrame([vars(finding) for finding in self.findings])

    @property
    def summary(self) -> str:
        """One line: the subject, and how many checks held, failed and did not apply."""
        counts = {s: sum(f.status == s for f in self.findings) for s in MARKS}
        shown = [f"{count} {status}" for status, count in counts.items() if count]
        return f"{self.subject}: {', '.join(shown)}"

    def __str__(self) -> str:
        widest = max((len(finding.check) for finding in self.findings), default=0)
        lines = [self.summary]
        for finding in self.findings:
            start = f"{MARKS[finding.status]} {finding.check:<{widest}}  "
            cause = f" → {finding.cause}" if finding.cause else ""
            text = finding.detail + cause
            if finding.status == NOT_APPLICABLE:
                text = f"not applicable: {text}"
            indent = " " * len(start)
            lines.append(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=indent))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(_html_row(finding) for finding in self.findings)
        head = "".join(f"<th style='text-align:left'>{t}</th>" for t in ("", "check", "finding"))
        return (
            f"<p><b>{html.escape(self.summary)}</b></p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )


def _html_row(finding: Finding) -> str:
    color = COLORS[finding.status]
    text = html.escape(finding.detail)
    if finding.status == NOT_APPLICABLE:
        text = f"<i>not applicable:</i> {text}"
    if finding.cause:
        text += f"<br><b>→ {html.escape(finding.cause)}</b>"
    cells = (
        f"<td style='color:{color};font-weight:bold'>{MARKS[finding.status]}</td>",
        f"<td style='text-align:left;white-space:nowrap'>{html.escape(finding.check)}</td>",
        f"<td style='text-align:left'>{text}</td>",
    )
    return f"<tr>{''.join(cells)}</tr>"
