"""Behaviour suites before and after training, as a figure."""

from __future__ import annotations

from workbench.evaluation.report import BehaviourReport, SuiteScore
from workbench.live.answers import AFTER, BEFORE
from workbench.live.figures import INK, ORANGE, headline, label, literal_ticks, new_figure, png

HEIGHT = 0.34  # of a bar; a suite takes 1
BARS = ((0.19, BEFORE, "base_"), (-0.19, AFTER, ""))


def draw_suites(report: BehaviourReport) -> bytes:
    """Mean scores by suite and pooled, with 95 % intervals and thresholds, as PNG bytes.

    Without a comparison there is one bar a suite. The ground is transparent.
    """
    scores = [*report.suite_scores, report.pooled]
    figure = new_figure(12, 1.5 + 0.8 * len(scores))
    axes = figure.subplots()
    for place, found in enumerate(scores):
        _draw(axes, len(scores) - 1 - place, found, report.baseline is not None)
    names = [f"{found.name[:40]}\n({found.rows} rows)" for found in scores]
    axes.set_yticks(range(len(scores) - 1, -1, -1), names, color=INK, fontsize=10)
    literal_ticks(axes)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("mean score, 0 to 1, with its 95 % interval (orange: threshold)", color=INK)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    headline(figure, _finding(report))
    figure.tight_layout()
    return png(figure)


def _draw(axes, at: int, found: SuiteScore, compared: bool) -> None:
    for shift, color, prefix in BARS if compared else ((0.0, AFTER, ""),):
        value, low, high = (getattr(found, prefix + name) for name in ("score", "low", "high"))
        axes.barh(at + shift, value, height=HEIGHT, color=color)
        axes.plot([low, high], [at + shift] * 2, color=INK, linewidth=2)
        for end in (low, high):
            axes.plot([end, end], [at + shift - 0.07, at + shift + 0.07], color=INK, linewidth=2)
        label(axes, max(value, high) + 0.015, at + shift, f"{value:.2f}", va="center", color=INK)
    if found.threshold is not None:
        axes.plot([found.threshold] * 2, [at - 0.42, at + 0.42], color=ORANGE, linewidth=2.5)


def _finding(report: BehaviourReport) -> str:
    now = report.pooled
    if report.baseline is None:
        return f"Pooled score {now.score:.2f} over {now.rows} rows"
    return (
        f"Pooled score {now.base_score:.2f} → {now.score:.2f} (grey before, blue after): "
        f"{now.better} rows better, {now.worse} worse"
    )
