"""Phases are charged with what is evaluated in them, and disturb no other reading."""

from __future__ import annotations

import mlx.core as mx
import pytest

from workbench.probes.memory import memory_phase, read_memory, release_memory, reset_peak

SIZE = 40_000_000  # bytes


def filled(size: int = SIZE) -> mx.array:
    array = mx.zeros(size // 4) + 1
    mx.eval(array)
    return array


def test_a_phase_knows_its_peak_and_what_it_keeps():
    with memory_phase("passing") as passing:
        filled()
    with memory_phase("keeping") as keeping:
        kept = filled()
    assert passing.peak_bytes - passing.before.active_bytes >= SIZE
    assert abs(passing.kept_bytes) < SIZE // 100
    assert 0.99 * SIZE <= keeping.kept_bytes < 1.1 * SIZE
    assert kept.size == SIZE // 4
    assert keeping.seconds > 0
    assert "keeping" in str(keeping)


def test_a_lazy_array_is_charged_to_the_phase_that_evaluates_it():
    with memory_phase("forward") as forward:
        lazy = mx.zeros(SIZE // 4) + 1
    with memory_phase("evaluation") as evaluation:
        mx.eval(lazy)
    assert forward.kept_bytes < SIZE // 100
    assert evaluation.kept_bytes >= 0.99 * SIZE


def test_a_phase_begins_with_what_is_there():
    kept = filled()
    with memory_phase("nothing") as nothing:
        pass
    assert nothing.peak_bytes >= SIZE
    assert nothing.kept_bytes == 0
    assert kept.size == SIZE // 4


def test_the_peak_of_the_whole_goes_on():
    reset_peak()
    filled(2 * SIZE)
    high = read_memory().peak_bytes
    with memory_phase("small"):
        filled(SIZE // 10)
    assert read_memory().peak_bytes == high
    with memory_phase("outer") as outer:
        with memory_phase("inner") as inner:
            filled(4 * SIZE)
        with memory_phase("later"):
            filled(SIZE // 10)
    assert read_memory().peak_bytes >= 4 * SIZE
    assert outer.peak_bytes == inner.peak_bytes
    reset_peak()
    assert read_memory().peak_bytes < SIZE


def test_an_error_ends_the_phase():
    with pytest.raises(ValueError, match="planted"), memory_phase("failing") as failing:
        raise ValueError("planted")
    assert failing.after is not None


def test_released_memory_leaves_the_process():
    many = [mx.ones(250_000) + number for number in range(300)]  # 1 MB each: the C library's heap
    mx.eval(many)
    held = read_memory().process_bytes
    del many
    release_memory()
    after = read_memory()
    assert after.cache_bytes == 0
    assert held - after.process_bytes > 200e6
