"""The chart: one figure kept alive, throttled, and readable when it is over."""

from __future__ import annotations

import dataclasses
import io
import types

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from tests.toy_panel import toy_report
from workbench.live import chart as chart_module
from workbench.live.answers import accuracy_table, draw_accuracy
from workbench.live.chart import TrainingChart
from workbench.live.history import POINTS, History, thinned
from workbench.live.run_chart import CORNERS, PROCESS, SMOOTH, RunChart, draw
from workbench.live.scales import log_ticks, round_down, round_up, short_label, shown_steps

LIMIT = 2.5e9


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def area(png: bytes, color: str) -> int:
    """Pixels of exactly this colour."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return int(np.isclose(pixels(png)[..., :3], wanted, atol=0.01).all(axis=-1).sum())


def blue_area(png: bytes) -> int:
    return area(png, SMOOTH)


def falling(count: int, **changes: object) -> list:
    return [
        toy_report(
            s, 8 / s, grad_norm=30 / s**2, valid_loss=9 / s if s % 5 == 0 else None, **changes
        )
        for s in range(1, count + 1)
    ]


def test_picture_keeps_its_size_and_has_a_transparent_ground():
    sizes = {pixels(draw(reports)).shape for reports in ([], falling(1), falling(30))}
    assert len(sizes) == 1
    assert pixels(draw(falling(30)))[0, 0, 3] == 0


def test_moving_the_lines_gives_the_picture_of_a_fresh_figure():
    chart, history = RunChart(), History(limit_of=lambda report: LIMIT)
    for count, report in enumerate(falling(30), 1):
        history.extend([report])
        chart.update(history)
        if count in (1, 2, 5, 6, 17, 30):
            fresh = draw(falling(count), limit_of=lambda report: LIMIT)
            assert (pixels(chart.png()) == pixels(fresh)).all(), count


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e4])
def test_only_what_has_changed_is_drawn_anew_at_every_scale(scale):
    chart, history = RunChart(), History()
    for count, report in enumerate(falling(12), 1):
        changes = {name: getattr(report, name) * scale for name in ("loss", "grad_norm")}
        changes |= {"tokens_per_second": 40 * scale * count, "process_bytes": 1e9 * scale * count}
        history.extend([dataclasses.replace(report, **changes)])
        chart.update(history)
        picture = chart.png()
    fresh = RunChart()
    fresh.update(history)
    assert (pixels(picture) == pixels(fresh.png())).all()


def test_picture_shows_the_loss():
    flat = draw([toy_report(step, 1.0) for step in range(1, 20)])
    assert (pixels(flat) != pixels(draw(falling(19)))).any()


def test_missing_counters_are_left_out():
    with_process, without = draw(falling(9)), draw(falling(9, process_bytes=None))
    legend = area(without, PROCESS)
    assert area(with_process, PROCESS) > 3 * legend > 0


def test_odd_values_are_drawn_without_complaint():
    odd = [
        toy_report(1, 0.0, grad_norm=0.0, tokens_per_second=0.0, active_bytes=0, cache_bytes=0),
        toy_report(2, 1e6, grad_norm=1e-30, valid_loss=float("nan"), peak_bytes=0),
        toy_report(3, 1e-9, grad_norm=1e30, valid_loss=float("inf"), process_bytes=None),
    ]
    for count in (1, 2, 3):
        assert pixels(draw(odd[:count])).any()


def test_the_limit_is_drawn_where_it_is_near():
    near = draw(falling(9), limit_of=lambda report: LIMIT)
    assert (pixels(near) != pixels(draw(falling(9)))).any()


def test_smoothing_of_a_constant_is_that_constant():
    history = History([toy_report(step, 2.0) for step in range(1, 8)])
    assert history["smooth loss"] == pytest.approx(2.0)


def test_smoothing_lies_between_the_extremes_and_starts_at_the_first_value():
    losses = [3.0, 1.0, 4.0, 1.0, 5.0]
    averages = History([toy_report(1, loss) for loss in losses])["smooth loss"]
    assert averages[0] == pytest.approx(3.0)
    assert ((averages >= 1.0) & (averages <= 5.0)).all()


def test_history_in_pieces_is_the_history_at_once():
    reports = [toy_report(step, 1 / step) for step in range(1, 700)]
    whole, pieces = History(reports), History(reports[:100])
    pieces.extend(reports[100:650])
    pieces.extend(reports[650:])
    assert len(pieces) == 699
    for column in ("step", "loss", "smooth loss", "process"):
        assert (pieces[column] == whole[column]).all()


def test_best_validation_is_the_smallest_finite_one():
    values = [None, 3.0, float("nan"), 1.5, 2.0, float("-inf")]
    reports = [toy_report(step, valid_loss=value) for step, value in enumerate(values, 1)]
    assert History(reports).best_validation == (4, 1.5)
    assert History(reports[:1]).best_validation is None


def test_a_short_line_is_drawn_whole_without_what_is_missing():
    steps, values = np.arange(4.0), np.array([1.0, np.nan, np.inf, 2.0])
    assert [part.tolist() for part in thinned(steps, values)] == [[0.0, 3.0], [1.0, 2.0]]


@pytest.mark.parametrize("count", [POINTS + 1, 2 * POINTS, 99_991])
def test_a_long_line_keeps_its_outline_with_few_points(count):
    values = np.random.default_rng(0).normal(size=count)
    values[[7, count // 2, count - 1]] = 50.0, -50.0, 40.0
    steps, few = thinned(np.arange(count), values)
    assert len(few) <= POINTS
    assert (np.diff(steps) > 0).all()
    assert (values[steps] == few).all()
    assert {50.0, -50.0, 40.0} <= set(few)
    size = -(-count // (POINTS // 2))
    for start in range(0, count, size):
        stretch = values[start : start + size]
        assert {stretch.min(), stretch.max()} <= set(few)


class Cell:
    """Stands in for a cell's output; counts pictures."""

    def __init__(self):
        self.pictures = []

    def show_picture(self, png, size, text):
        self.pictures.append(png)


def test_chart_draws_less_often_than_it_is_fed(monkeypatch):
    cell = Cell()
    monkeypatch.setattr(chart_module, "kernel_shell", types.SimpleNamespace)
    monkeypatch.setattr(chart_module, "Slot", lambda: cell)
    chart = TrainingChart([toy_report(1)])
    for step in range(2, 31):
        chart.add(toy_report(step))
    first = chart.draw_seconds
    chart.close()
    assert chart.smoothed_loss == pytest.approx(1.0)
    assert 0 < first < chart.draw_seconds, "one picture at the start, one at the end"
    assert len(cell.pictures) == 2
    assert (pixels(cell.pictures[-1]) == pixels(draw([toy_report(s) for s in range(1, 31)]))).all()


def test_chart_outside_of_a_notebook_shows_nothing(capsys):
    chart = TrainingChart()
    chart.add(toy_report(1))
    chart.close()
    TrainingChart().close()
    assert capsys.readouterr() == ("", "")


def test_accuracy_is_counted_by_phrasing():
    before = pd.DataFrame({"phrasing": ["a {country}", "a {country}", "b"], "correct": [1, 0, 0]})
    after = before.assign(correct=[1, 1, 0])
    table = accuracy_table(before, after, trained={"b"})
    assert table["before (%)"].tolist() == [50, 0]
    assert table["after (%)"].tolist() == [100, 0]
    assert table["trained"].tolist() == [False, True]
    assert table.index.tolist() == ["a X", "b"]


def test_accuracy_figure_draws_longer_bars_for_better_answers():
    table = pd.DataFrame(
        {"trained": [True, False], "before (%)": [10.0, 10.0], "after (%)": [90.0, 80.0]},
        index=["What is $x$?", "Tell me"],
    )
    worse = table.assign(**{"after (%)": [20.0, 20.0]})
    assert blue_area(draw_accuracy(table)) > blue_area(draw_accuracy(worse)) > 0


def test_limits_are_round_and_lie_outside():
    for value in (0.00123, 1.0, 7.3, 9.99, 10.0, 123456.0):
        assert round_down(value) <= value <= round_up(value) * 1.000001
        assert round_up(value) <= 1.6 * value
        assert round_down(value) >= value / 1.6


@pytest.mark.parametrize("total", [1, 10, 61, 1000, 100_000])
def test_the_step_axis_holds_what_was_done_and_moves_rarely(total):
    ends = [shown_steps(toy_report(step, total_steps=total)) for step in range(1, total + 1)]
    assert all(end >= step for step, end in enumerate(ends, 1))
    assert ends[-1] == max(2, total)
    assert ends == sorted(ends)
    assert len(set(ends)) <= 14


@pytest.mark.parametrize("low", [0.0004, 0.3, 5.0])
@pytest.mark.parametrize("factor", [4.0, 30.0, 1e4])
def test_ticks_of_norms_are_few_and_inside(low, factor):
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 6
    assert all(0.99 * low <= tick <= 1.01 * low * factor for tick in ticks)


def test_tick_labels_are_short_and_right():
    shown = {0: "0", 0.25: "0.25", 7.5: "7.5", 500: "500", 15_000: "15k", 2e6: "2M", 3e-4: "3e-4"}
    shown |= {2.5e9: "2.5G", 12e9: "12G", 1e33: "1e33"}
    assert {value: short_label(value, 0) for value in shown} == shown
    assert all(len(short_label(10.0**power, 0)) <= 5 for power in range(-12, 40))


def test_tick_labels_lose_nothing():
    for power in range(-9, 20):
        for step in (1, 2, 5):
            for count in range(1, 7):
                value = step * count * 10.0**power
                factor = {"k": 1e3, "M": 1e6, "G": 1e9}
                shown = short_label(value, 0)
                number = float(shown.rstrip("kMG")) * factor.get(shown[-1], 1.0)
                assert number == pytest.approx(value)


@pytest.mark.parametrize("total", [50, 1000, 20_000])
def test_the_last_number_below_an_axis_is_not_cut(total):
    chart = RunChart()
    chart.update(History([toy_report(step, total_steps=total) for step in (1, total)]))
    chart.png()
    renderer = chart._figure.canvas.get_renderer()
    for axes, (_, right, _, _) in zip(chart._figure.axes, CORNERS):
        shown = [
            label.get_window_extent(renderer).x1
            for place, label in zip(axes.get_xticks(), axes.get_xticklabels())
            if place <= axes.get_xlim()[1]
        ]
        assert max(shown) <= right * chart.size[0]
