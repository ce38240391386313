"""Learning rate at the corners."""

import math

import pytest

from workbench.errors import ConfigError
from workbench.tuning.schedules import SCHEDULES, learning_rate_at


def rate(step, schedule="cosine", peak=1.0, floor=0.1, warmup_steps=4, total_steps=20, **shape):
    return learning_rate_at(
        step,
        schedule=schedule,
        peak=peak,
        floor=floor,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        **shape,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_straight_line_that_starts_above_zero(schedule):
    assert [rate(step, schedule) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_peak_is_reached_and_never_exceeded(schedule, warmup_steps):
    rates = [rate(step, schedule, warmup_steps=warmup_steps) for step in range(20)]
    assert max(rates) == rates[warmup_steps] == 1.0
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)


def test_constant_stays_at_the_peak():
    assert {rate(step, "constant") for step in range(4, 20)} == {1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_half_way_is_the_mean_and_the_end_the_floor(schedule):
    assert rate(20, schedule) == pytest.approx(0.1)
    assert rate(12, schedule) == pytest.approx(0.55)
    assert rate(50, schedule) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_step_still_moves(schedule):
    assert rate(19, schedule, floor=0.0) > 0


def test_linear_and_cosine_part_between_the_corners():
    assert rate(8, "linear") == pytest.approx(1 - 0.9 / 4)
    assert rate(8, "cosine") == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_is_made_at_the_peak(schedule):
    assert rate(0, schedule, warmup_steps=0, total_steps=1) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_longer_than_the_run_ends_below_the_peak(schedule):
    assert rate(19, schedule, warmup_steps=100) == pytest.approx(0.2)


def test_an_unknown_schedule_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"unknown schedule 'step'.*constant.*linear.*cosine"):
        rate(5, "step")


def test_wsd_stays_at_the_peak_until_it_comes_down():
    rates = [rate(step, "wsd", decay_steps=4) for step in range(21)]
    assert rates[4:17] == [1.0] * 13
    assert rates[17:] == pytest.approx([0.775, 0.55, 0.325, 0.1])


def test_wsd_comes_down_over_a_tenth_unless_told_otherwise():
    assert [rate(step, "wsd", warmup_steps=0) for step in (17, 18, 19)] == [1.0, 1.0, 0.55]
    assert rate(2, "wsd", warmup_steps=0, total_steps=3) == 1.0


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_polynomial_follows_its_power(power):
    assert rate(12, "polynomial", power=power) == pytest.approx(0.1 + 0.9 * 0.5**power)


def test_a_power_of_one_is_a_straight_line():
    steps = range(25)
    assert [rate(s, "polynomial") for s in steps] == [rate(s, "linear") for s in steps]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_a_descent_may_end_before_the_run_or_after_it(schedule):
    short = [rate(step, schedule, decay_steps=8) for step in range(20)]
    assert short == [rate(step, schedule, total_steps=12) for step in range(20)]
    assert short[12:] == pytest.approx([0.1] * 8)
    long = [rate(step, schedule, decay_steps=36) for step in range(20)]
    assert long == [rate(step, schedule, total_steps=40) for step in range(20)]
    assert long[-1] > 0.5


@pytest.mark.parametrize("first", [0.0, 0.1, 0.25])
def test_warm_up_from_a_given_rate_is_a_straight_line_to_the_peak(first):
    rates = [rate(step, warmup_steps=4, warmup_from=first) for step in range(5)]
    assert rates[0] == first
    assert rates[3:] == [1.0, 1.0]
    assert rates[:4] == pytest.approx([first + (1 - first) * step / 3 for step in range(4)])


def test_warm_up_never_begins_above_the_peak():
    assert rate(0, warmup_from=3.0) == 1.0
    assert rate(0, warmup_steps=0, warmup_from=0.5) == 1.0
