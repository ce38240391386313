"""A behaviour report as HTML: a table for a cell, and a page that needs no other file."""

from __future__ import annotations

import html
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.evaluation.report import BehaviourReport, RowResult, SuiteScore

GREY, BLUE, GREEN, RED = "#b3bac2", "#2f6fde", "#2a9d8f", "#e05260"
INK = "#7d8590"
WIDTH = 220  # of a bar, in pixels
STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #6b7480; }
@media (prefers-color-scheme: dark) { :root { --quiet: #9aa4af; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem; background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
p { margin: .2rem 0 .8rem; } .quiet { color: var(--quiet); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--quiet); }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); }
th, td { vertical-align: top; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 30%; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; font-weight: 600; } details { margin: .8rem 0; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: BehaviourReport) -> str:
    """The whole report as a document without scripts or outside sources."""
    title = html.escape(f"Behaviour of {report.model}")
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.created))
    details = "".join(
        _suite_rows(report, name, description)
        for name, description in ((suite.name, suite.description) for suite in report.suites)
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<h1>{title}</h1><p class='quiet'>{html.escape(written)} · {_verdict(report)}</p>"
        f"{scores_table(report)}{details}</body></html>\n"
    )


def _verdict(report: BehaviourReport) -> str:
    compared = f"compared with {report.baseline} · " if report.baseline else ""
    every = (*report.suite_scores, report.pooled)
    if not any(found.threshold is not None for found in every):
        return html.escape(f"{compared}no thresholds")
    missed = report.failures
    verdict = (
        f"misses its threshold in: {', '.join(missed)}" if missed else "all thresholds reached"
    )
    return html.escape(compared + verdict)


def scores_table(report: BehaviourReport) -> str:
    """A row a suite: bars, scores with their intervals, counts, thresholds."""
    compared = report.baseline is not None
    heads = ["suite", "", "score (95 %)"]
    heads += [f"before: {report.baseline}", "better / worse (p)"] if compared else []
    heads += ["rows", "threshold"]
    head = "".join(f"<th style='text-align:left'>{html.escape(text)}</th>" for text in heads)
    rows = "".join(_score_row(found, compared) for found in (*report.suite_scores, report.pooled))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _score_row(found: SuiteScore, compared: bool) -> str:
    bars = _bar(found.score, found.low, found.high, BLUE)
    cells = [_share(found.score, found.low, found.high)]
    if compared:
        bars = _bar(found.base_score, found.base_low, found.base_high, GREY) + bars
        cells.append(_share(found.base_score, found.base_low, found.base_high))
        cells.append(f"{found.better} / {found.worse} ({found.p_value:.2g})")
    cells.append(str(found.rows))
    numbers = "".join(f"<td class='number' style='text-align:left'>{cell}</td>" for cell in cells)
    name = f"<td style='text-align:left'>{html.escape(found.name)}</td>"
    return f"<tr>{name}<td>{bars}</td>{numbers}{_threshold(found)}</tr>"


def _threshold(found: SuiteScore) -> str:
    if found.threshold is None:
        return f"<td style='text-align:left;color:{INK}'>none</td>"
    mark, color = ("✓", GREEN) if found.passed else ("✗ misses", RED)
    style = f"text-align:left;white-space:nowrap;color:{color};font-weight:bold"
    return f"<td style='{style}'>{mark} {found.threshold:.2f}</td>"


def _share(value: float, low: float, high: float) -> str:
    return f"<b>{value:.2f}</b> ({low:.2f} to {high:.2f})"


def _bar(value: float, low: float, high: float, color: str) -> str:
    filled = f"height:9px;width:{WIDTH * value:.0f}px;background:{color}"
    interval = (
        f"position:absolute;top:3px;height:3px;left:{WIDTH * low:.0f}px;"
        f"width:{WIDTH * (high - low):.0f}px;background:currentColor;opacity:0.55"
    )
    return (
        f"<div style='position:relative;width:{WIDTH}px;height:9px;margin:3px 0;"
        f"background:#8882'><div style='{filled}'></div><div style='{interval}'></div></div>"
    )


def _suite_rows(report: BehaviourReport, name: str, description: str) -> str:
    results = [result for result in report.results if result.suite == name]
    heads = ["row", "prompt", "answer"]
    heads += [f"before: {report.baseline}"] if report.baseline is not None else []
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    rows = "".join(_row(result) for result in results)
    return (
        f"<h2>{html.escape(name)}</h2><p class='quiet'>{html.escape(description)}</p>"
        f"<details open><summary>{len(results)} rows</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _row(result: RowResult) -> str:
    name = f"{html.escape(result.id)}<br><span class='quiet'>{html.escape(result.kind)}</span>"
    cells = f"<td>{name}</td><td class='text'>{html.escape(result.prompt)}</td>"
    cells += _answer(result.answer, result.score, result.note)
    if result.base_score is not None:
        cells += _answer(result.base_answer, result.base_score, result.base_note)
    return f"<tr>{cells}</tr>"


def _answer(text: str, score: float, note: str) -> str:
    color = GREEN if score >= 0.5 else RED
    return (
        f"<td class='text'>{html.escape(text)}<br>"
        f"<b style='color:{color}'>{score:.2f}</b> "
        f"<span class='quiet'>{html.escape(note)}</span></td>"
    )
