"""Drawing stays cheap, and the time that is left is told honestly."""

from __future__ import annotations

import random

import pytest

from workbench.live.pace import COST_FACTOR, FREE, Forecast, Pace, in_words, times_between


class Clock:
    """Time that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def refreshes(costs, step_seconds: float, total: float, share: float = 0.015) -> list[float]:
    """Times of refreshes in a loop of steps; asserts the bounds after each."""
    clock = Clock()
    pace, times, free_until, first = Pace(1.0, share, clock), [], 0.0, 0.0
    while clock.now < 1000.0 + total:
        clock.now += step_seconds
        if not pace.due:
            continue
        cost = next(costs)
        assert clock.now >= free_until
        with pace.spending():
            clock.now += cost
        times.append(clock.now)
        first = first or cost
        assert pace.seconds <= FREE + first + share * (clock.now - 1000.0) + cost
        free_until = clock.now + (max(1.0, COST_FACTOR * cost) if len(times) > 1 else 1.0) - 1e-9
    return times


@pytest.mark.parametrize("step_seconds", [0.001, 0.2, 5.0])
@pytest.mark.parametrize("cost", [0.001, 0.03, 0.3])
def test_refreshes_keep_their_bounds(step_seconds, cost):
    times = refreshes(iter(lambda: cost, None), step_seconds, 120)
    assert len(times) >= 4, "and still come"
    assert cost * len(times) <= 0.03 * 120


def test_costs_that_vary_keep_the_bounds():
    chance = random.Random(0)
    refreshes(iter(lambda: chance.choice([0.01, 0.1, 0.4]), None), 0.1, 300)


def test_an_expensive_first_picture_does_not_delay_the_second():
    costs = iter([0.45, *[0.02] * 500])
    times = refreshes(costs, 0.1, 10)
    assert times[1] - times[0] < 1.5


def test_spending_counts_what_failed_too():
    clock = Clock()
    pace = Pace(1.0, 0.1, clock)

    def fail():
        with pace.spending():
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert pace.seconds == 2
    assert not pace.due


def test_forecast_of_an_even_run_is_exact():
    forecast = Forecast()
    assert forecast.remaining(9, {"validation": 1, "samples": 0}) is None
    for _ in range(10):
        forecast.add_step(2.0)
        forecast.add_around(0.5)
    forecast.add_extra("validation", 30.0)
    forecast.add_extra("samples", 7.0)
    seconds, complete = forecast.remaining(20, {"validation": 2, "samples": 3})
    assert seconds == pytest.approx(20 * 2.5 + 2 * 30 + 3 * 7)
    assert complete


def test_forecast_says_when_something_was_never_seen():
    forecast = Forecast()
    forecast.add_step(1.0)
    assert forecast.remaining(5, {"validation": 0, "samples": 0}) == (5.0, True)
    assert forecast.remaining(5, {"validation": 1, "samples": 0}) == (5.0, False)


def test_forecast_follows_steps_that_grow_slower():
    forecast = Forecast()
    for seconds in [1.0] * 100 + [3.0] * 100:
        forecast.add_step(seconds)
    assert forecast.remaining(10, {})[0] == pytest.approx(30.0)


@pytest.mark.parametrize("total", [1, 7, 10, 12])
@pytest.mark.parametrize("every", [0, 1, 3, 5, 20])
def test_times_between_counts_what_a_loop_would_do(total, every):
    for done in range(total + 1):
        due = [s for s in range(done + 1, total + 1) if s == total or (every and s % every == 0)]
        assert times_between(done, total, every) == len(due)


def test_times_are_written_as_on_a_clock():
    assert [in_words(s) for s in (0, 7.4, 59.6, 754, 3723)] == [
        "0:00",
        "0:07",
        "1:00",
        "12:34",
        "1:02:03",
    ]
