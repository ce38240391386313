"""What a sweep's runs get, and what their folders are called."""

import math
import os
import re

import numpy as np
import pytest

from workbench.errors import ConfigError
from workbench.runs.grids import MAX_RUNS, Between, combinations, folder_name, values_of

GRID = {"rank": [2, 4], "learning_rate": [1e-3, 2e-3, 4e-3]}


def nested(depth: int) -> list:
    """Lists in one another."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_grid_gives_every_combination_the_last_name_fastest():
    runs = combinations(GRID)
    assert len(runs) == 6
    assert runs[:2] == [
        {"rank": 2, "learning_rate": 1e-3},
        {"rank": 2, "learning_rate": 2e-3},
    ]


def test_values_become_those_of_json():
    (run,) = combinations([{"a": np.float32(0.5), "b": (1, np.int64(2)), "c": {"d": None}}])
    assert run == {"a": 0.5, "b": [1, 2], "c": {"d": None}}
    assert type(run["a"]) is float
    assert combinations({"a": np.linspace(0, 1, 3)}) == [{"a": 0.0}, {"a": 0.5}, {"a": 1.0}]
    assert combinations({"a": range(2)}) == [{"a": 0}, {"a": 1}]


def test_samples_are_different_runs_of_the_grid_and_the_same_for_a_seed():
    runs = combinations(GRID, samples=4, seed=3)
    assert len(runs) == 4
    assert all(run in combinations(GRID) for run in runs)
    assert len({folder_name(run) for run in runs}) == 4
    assert runs == combinations(GRID, samples=4, seed=3)
    assert runs != combinations(GRID, samples=4, seed=4)
    assert len(combinations(GRID, samples=6)) == 6


def test_drawn_values_stay_between_their_ends():
    grid = {"a": Between(1e-5, 1e-1, log=True), "b": Between(1, 3), "c": Between(0.0, 2.0)}
    runs = combinations(grid, samples=400)
    for name, low, high in (("a", 1e-5, 1e-1), ("b", 1, 3), ("c", 0, 2)):
        assert all(low <= run[name] <= high for run in runs)
    assert {run["b"] for run in runs} == {1, 2, 3}
    below = sum(run["a"] < 1e-3 for run in runs) / len(runs)
    assert below == pytest.approx(0.5, abs=0.1), "half of them below the geometric mean"


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({}, {}, "the grid is empty"),
        ({"a": []}, {}, "a has no values"),
        ([], {}, "no runs"),
        ({"a": "abc"}, {}, "a must be a list of values"),
        ({"a": 3}, {}, "a must be a list of values"),
        ("a", {}, "needs parameters"),
        ([1], {}, "needs parameters"),
        ({"a": [1, 2, 1]}, {}, "a=1 is there twice"),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], {}, "twice"),
        ({"a": [math.nan]}, {}, "a cannot be 'nan'"),
        ({"a": [object]}, {}, "a cannot be"),
        ({"a": ["\ud800"]}, {}, r"a cannot be '\ud800'"),
        ([{"a": {"\ud800": 1}}], {}, "a cannot be"),
        ({"a": [10**5000]}, {}, "a cannot be this int: it is too large"),
        ({"a": 10**5000}, {}, "must be a list of values, got this int"),
        ({"a": [nested(100_000)]}, {}, "a cannot be this list"),
        ({"a": [1, 2]}, {"seed": [1]}, "seed must be a whole number"),
        ({"a": [1, 2]}, {"samples": 1, "seed": "x"}, "seed must be a whole number"),
        ({"a": range(200), "b": range(200)}, {}, f"40000 runs are more than {MAX_RUNS}"),
        ({"a": [1, 2]}, {"samples": 3}, "gives 2 different runs, fewer than 3"),
        ({"a": [1, 2]}, {"samples": 0}, "samples must be a whole number"),
        ({"a": Between(0, 1)}, {}, "a is drawn: say how often"),
        ([{"a": 1}], {"samples": 1}, "not from a list"),
    ],
)
def test_what_cannot_be_run_is_named(given, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        combinations(given, **settings)


@pytest.mark.parametrize("ends", [(1, 1), (2, 1), (math.nan, 1), ("a", 2), (0, math.inf)])
def test_between_needs_two_numbers_that_rise(ends):
    with pytest.raises(ConfigError):
        Between(*ends)
    with pytest.raises(ConfigError, match="above 0"):
        Between(0, 1, log=True)


def test_folder_names_are_stable_safe_and_different():
    name = folder_name({"rank": 4, "learning_rate": 1e-3})
    assert name == "rank=4,learning_rate=0.001-c47e35d9b9"
    hostile = [{"a": text} for text in ("../../etc", "/", "\0", "x" * 500, "é\n", "..", "")]
    names = [folder_name(run) for run in [*hostile, {}, {"a": 1}, {"a": 1.0}, {"a": "1"}]]
    assert len(set(names)) == len(names)
    for each in names:
        assert os.path.basename(each) == each
        assert each.isprintable()
        assert len(each) < 120


def test_values_of_a_command_line():
    assert values_of("1e-3,2") == [1e-3, 2]
    assert values_of("[1,2],[3]") == [[1, 2], [3]]
    assert values_of("linear, cosine,3") == ["linear", "cosine", 3]
    assert values_of("'a,b','c'") == ["a,b", "c"]
    assert values_of("True,None") == [True, None]
