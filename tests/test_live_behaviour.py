"""The figure of behaviour suites."""

from tests.test_behaviour import made
from workbench.live import behaviour

SCORES = {"a $\\frac{$": [1, 0.5], "b": [0, 0]}


def drawn(report, monkeypatch):
    """The figure's axes."""
    kept = []
    monkeypatch.setattr(behaviour, "png", lambda figure: kept.append(figure) or b"")
    behaviour.draw_suites(report)
    return kept[0].axes[0], kept[0]


def test_a_bar_a_suite_and_one_for_all(monkeypatch):
    axes, figure = drawn(made(SCORES), monkeypatch)
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0, 0.375]
    assert "Pooled score 0.38 over 4 rows" in figure._suptitle.get_text()


def test_a_comparison_has_both_bars_intervals_and_thresholds(monkeypatch):
    before = {name: [0.5, 0] for name in SCORES}
    report = made(SCORES, before, threshold=0.6)
    axes, figure = drawn(report, monkeypatch)
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75, 0.25, 0, 0.25, 0.375]
    assert "0.25 → 0.38" in figure._suptitle.get_text()
    assert "2 rows better, 1 worse" in figure._suptitle.get_text()
    lines = [tuple(line.get_xdata()) for line in axes.lines]
    first = report.suite_scores[0]
    assert (first.base_low, first.base_high) in lines
    assert (first.low, first.high) in lines
    assert lines.count((0.6, 0.6)) == 3


def test_it_is_a_picture():
    assert behaviour.draw_suites(made(SCORES, SCORES, 0.5)).startswith(b"\x89PNG")
