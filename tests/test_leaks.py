"""A planted leak is found with its size; noise and sawteeth are not."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from workbench.errors import ConfigError
from workbench.probes.leaks import HARMLESS, find_leak
from workbench.probes.memory import read_memory

MEGA = 1_000_000


@pytest.mark.parametrize("slope", [0.3 * MEGA, 3 * MEGA, 2000 * MEGA])
def test_a_planted_leak_is_found_with_its_size(slope):
    noise = np.random.default_rng(0).normal(0, 5 * MEGA, 120)
    report = find_leak(500 * MEGA + slope * np.arange(120) + noise)
    assert report.verdict == "leaking"
    assert report.low <= slope <= report.high
    assert report.slope == pytest.approx(slope, rel=0.3)
    assert "leaking: +" in str(report)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_a_leak(seed):
    noise = np.random.default_rng(seed).normal(0, MEGA, 300)
    assert find_leak(500 * MEGA + noise).verdict == "flat"


def test_a_sawtooth_is_not_a_leak():
    assert find_leak([500 * MEGA + (step % 16) * MEGA for step in range(400)]).verdict == "flat"


def test_a_wandering_curve_gets_a_wide_interval():
    steps = np.random.default_rng(1).normal(0, MEGA, 60)
    wandering, jumping = find_leak(np.cumsum(steps)), find_leak(steps)
    assert wandering.high - wandering.low > 3 * (jumping.high - jumping.low)
    assert wandering.verdict != "leaking"


def test_warmup_is_left_out():
    curve = [*np.linspace(0, 1000 * MEGA, 10), *[1000 * MEGA] * 40]
    assert find_leak(curve).verdict == "flat"
    assert find_leak(curve).slope == 0
    assert find_leak(curve, warmup_steps=0).verdict != "flat"


def test_steps_until_a_limit():
    report = find_leak([MEGA * step for step in range(50)])
    assert report.steps_until(100 * MEGA) == pytest.approx(50)
    assert report.steps_until(1) == 0
    assert find_leak([5.0] * 50).steps_until(100) == math.inf


def test_arrays_that_are_kept_are_a_leak():
    kept, readings = [], []
    for _ in range(30):
        kept.append(mx.zeros(MEGA // 4))
        mx.eval(kept[-1])
        readings.append(read_memory().active_bytes)
    report = find_leak(readings)
    assert report.verdict == "leaking"
    assert report.slope == pytest.approx(MEGA, rel=0.1)
    assert report.harmless == HARMLESS


@pytest.mark.parametrize(
    ("readings", "settings"),
    [
        ([1.0] * 12, {}),
        ([1.0] * 40 + [math.nan], {}),
        ([1.0] * 40, {"warmup_steps": -1}),
        ([1.0] * 40, {"confidence": 1.0}),
        ([1.0] * 40, {"harmless": -1.0}),
    ],
)
def test_what_cannot_be_judged_is_refused(readings, settings):
    with pytest.raises(ConfigError):
        find_leak(readings, **settings)
