"""Pictures of memory: numbers from the readings, titles that state the finding, no formulas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from workbench.errors import ConfigError
from workbench.live import memory
from workbench.probes.leaks import find_leak
from workbench.probes.memory import MemoryReading, PhaseReading

MB = 1_000_000


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, in order."""
    drawn = []
    monkeypatch.setattr(memory, "png", lambda figure: drawn.append(figure) or b"")
    return drawn


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def phase(name: str, before: int, peak: int, after: int) -> PhaseReading:
    held = [MemoryReading(n * MB, 0, 0, 0, 0) for n in (before, after)]
    return PhaseReading(name, 0.5, peak * MB, *held)


def loop(active: list[float], process: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"active_bytes": active, "process_bytes": process}) * MB


def test_phases_stand_on_what_was_there_before(figures):
    memory.draw_phases([phase("$load$", 0, 540, 538), phase("backward", 538, 900, 550)])
    (axes,) = figures[0].axes
    before, above = axes.containers[0], axes.containers[1]
    assert [bar.get_width() for bar in before] == [0, 538]
    assert [bar.get_x() + bar.get_width() for bar in above] == [540, 900]
    assert title(figures[0]) == "The peak is in: backward"
    assert not any(text.get_parse_math() for text in axes.get_yticklabels())


def test_loops_are_drawn_above_their_first_step_and_the_unseen_one_is_named(figures):
    loops = {
        "right": loop([500, 500, 500], [900, 900, 901]),
        "unseen": loop([500, 500, 500], [800, 850, 900]),
        "seen": loop([500, 600, 700], [800, 900, 1000]),
    }
    memory.draw_loops(loops)
    left, right = figures[0].axes
    assert [line.get_ydata()[-1] for line in left.lines] == [0, 0, 200]
    assert [line.get_ydata()[-1] for line in right.lines] == [1, 100, 200]
    assert title(figures[0]) == "unseen: after 3 steps 100 MB more in the process, 0 for MLX"


def test_leak_line_has_the_reported_slope_and_begins_after_the_warm_up(figures):
    curves = {"leaks": [(500 + 2.0 * step) * MB for step in range(30)], "flat": [500 * MB] * 30}
    reports = {name: find_leak(curve, warmup_steps=10) for name, curve in curves.items()}
    memory.draw_leak(curves, reports)
    lines = [line for line in figures[0].axes[0].lines if len(line.get_xdata()) == 20]
    assert [np.diff(line.get_ydata()).mean() for line in lines] == pytest.approx([2, 0])
    assert [line.get_xdata()[0] for line in lines] == [11, 11]
    assert lines[0].get_ydata()[0] == pytest.approx(520)
    assert title(figures[0]) == "Leaking: leaks"


def test_guard_shows_both_limits_and_the_events_where_they_happened(figures):
    memory.draw_guard([600 * MB, 900 * MB, 1000 * MB, 700 * MB], 1000 * MB, {3: "stopped"})
    (axes,) = figures[0].axes
    levels = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert levels[:2] == [1.0, 0.8]
    (ring,) = [line for line in axes.lines if line.get_markersize() == 11]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (3, 1.0)
    assert title(figures[0]) == "stopped"


def test_planned_errors_are_counted_from_the_measured_peak(figures):
    table = pd.DataFrame(
        {
            "configuration": ["real 1 × 8", "real 2 × 8", "$toy$ 1 × 8"],
            "planned_mb": [105.0, 98.0, 11.0],
            "measured_mb": [100.0, 100.0, 10.0],
        }
    )
    memory.draw_planned(table)
    points = np.concatenate([line.get_ydata() for line in figures[0].axes[1].lines])
    assert points == pytest.approx([5, -2, 10])
    assert title(figures[0]) == "3 configurations: planned 5.0% off in the median, 10.0% at worst"


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda: memory.draw_phases([]), "phase"),
        (lambda: memory.draw_loops({}), "loop"),
        (lambda: memory.draw_loops({"a": pd.DataFrame()}), "step"),
        (lambda: memory.draw_leak({}, {}), "curve"),
        (lambda: memory.draw_leak({"a": [1.0] * 30}, {}), "report"),
        (lambda: memory.draw_guard([], 1, {}), "step"),
        (lambda: memory.draw_guard([1], 1, {2: "x"}), "step 2"),
        (lambda: memory.draw_planned(pd.DataFrame()), "configuration"),
    ],
)
def test_nothing_to_draw_is_refused(draw, what):
    with pytest.raises(ConfigError, match=f"no {what}"):
        draw()
