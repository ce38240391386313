"""A benchmark's bars are where its numbers are, and its titles say no more than they do."""

import math

import pandas as pd
import pytest

from workbench.errors import ConfigError
from workbench.live import benchmark, status

MISSING = math.nan


def row(workload, peer, ratio, mlx=MISSING, process=MISSING, ours=1.0):
    return {
        "workload": workload,
        "title": "some $work$",
        "peer": peer,
        "ratio": ratio,
        "least": 0.9 * ratio,
        "most": 1.1 * ratio,
        "MLX peak GB": mlx,
        "process peak GB": process,
        "ours / its MLX peak": ours / mlx,
    }


@pytest.fixture
def table():
    return pd.DataFrame(
        [
            row("W1", "ours", 1, 1.0, 2.0),
            row("W1", "mlx-lm", 24, 2.0, 3.0),
            row("W1", "torch", 0.5, MISSING, 4.0),
            row("W2", "ours", 1, 1.0, 2.0),
            row("W2", "mlx-lm", 40, 4.0, 3.0),
            row("W5", "ours", 1),
            row("W5", "mlx-lm", 2),
        ]
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, in order."""
    drawn = []
    monkeypatch.setattr(benchmark, "png", lambda figure: drawn.append(figure) or b"")
    return drawn


def test_bars_begin_at_equal_and_end_at_the_ratio(figures, table):
    benchmark.draw_speed(table)
    axes = figures[0].axes[0]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert [{round(end, 6) for end in bar} - {1} for bar in bars] == [{24}, {0.5}, {40}, {2}]
    assert axes.get_xscale() == "log"
    left, right = axes.get_xlim()
    assert left < 0.45
    assert right > 44
    title = figures[0].get_suptitle()
    assert title == "Times as long as ours: mlx-lm 2 to 40, torch 0.5"


def test_peaks_show_what_is_known(figures, table):
    benchmark.draw_peaks(table)
    axes = figures[0].axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [2.0, 1.0, 3.0, 2.0, 4.0, 2.0, 1.0, 3.0, 4.0]
    assert figures[0].get_suptitle() == "Ours holds 25 to 50 % of the arrays of mlx-lm"
    assert len(axes.get_yticks()) == 2, "W5 has no peaks"


def test_both_are_pictures(table):
    assert benchmark.draw_speed(table).startswith(b"\x89PNG")
    assert benchmark.draw_peaks(table).startswith(b"\x89PNG")


def test_nothing_to_draw_is_said(table):
    alone = table[table["peer"] == "ours"]
    with pytest.raises(ConfigError, match="no peer to compare with"):
        benchmark.draw_speed(alone)
    for empty in (table[table["workload"] == "W5"], table.drop(columns="process peak GB")):
        with pytest.raises(ConfigError, match="no peaks"):
            benchmark.draw_peaks(empty)


def test_status_line_shows_text_as_it_is(monkeypatch):
    shown = []
    monkeypatch.setattr(status, "kernel_shell", lambda: object())
    monkeypatch.setattr(status.Slot, "show", lambda self, data: shown.append(data))
    line = status.StatusLine()
    line("step <1>")
    assert "&lt;1&gt;" in shown[0]["text/html"]
    monkeypatch.setattr(status, "kernel_shell", lambda: None)
    status.StatusLine()("outside of a notebook")
    assert len(shown) == 1
