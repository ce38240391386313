"""The chart: drawn in the cell, throttled, and readable when it is over."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from workbench.live.answers import accuracy_table, draw_accuracy
from workbench.live.chart import TrainingChart, draw, smoothed
from workbench.tuning.config import StepReport


def report(step: int, loss: float = 1.0, valid_loss: float | None = None) -> StepReport:
    memory = {"active_bytes": 6e8, "cache_bytes": 1e9, "peak_bytes": 9e8, "process_bytes": 2e9}
    rates = {"learning_rate": 1e-3, "grad_norm": 1.0, "clipped_grad_norm": 1.0}
    counts = {"step": step, "total_steps": 30, "epoch": 1, "num_tokens": 9, "num_input_tokens": 90}
    speed = {"step_seconds": 0.5, "tokens_per_second": 180.0}
    return StepReport(**counts, **rates, **speed, **memory, loss=loss, valid_loss=valid_loss)


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def blue_area(png: bytes) -> int:
    blue = np.isclose(pixels(png)[..., :3], np.array([0x2F, 0x6F, 0xDE]) / 255, atol=0.01)
    return int(blue.all(axis=-1).sum())


def test_picture_keeps_its_size_and_has_a_transparent_ground():
    few, many = draw([report(1)]), draw([report(s, 1 / s, 0.5) for s in range(1, 31)])
    assert pixels(few).shape == pixels(many).shape
    assert pixels(many)[0, 0, 3] == 0


def test_picture_shows_the_loss():
    flat = draw([report(step, 1.0) for step in range(1, 20)])
    falling = draw([report(step, 1 / step) for step in range(1, 20)])
    assert (pixels(flat) != pixels(falling)).any()


def test_smoothing_of_a_constant_is_that_constant():
    assert smoothed([2.0] * 7) == pytest.approx([2.0] * 7)


def test_smoothing_lies_between_the_extremes_and_starts_at_the_first_value():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    averages = smoothed(values)
    assert averages[0] == pytest.approx(3.0)
    assert all(1.0 <= average <= 5.0 for average in averages)


def test_chart_draws_less_often_than_it_is_fed(capsys):
    chart = TrainingChart()
    for step in range(1, 31):
        chart.add(report(step))
    first = chart.draw_seconds
    chart.close()
    assert len(chart.reports) == 30
    assert 0 < first < chart.draw_seconds, "one picture at the start, one at the end"
    assert capsys.readouterr().out.count("Image") == 2


def test_chart_without_a_step_draws_nothing(capsys):
    TrainingChart().close()
    assert capsys.readouterr().out == ""


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
