"""The guard warns, empties the cache, and stops before the machine swaps."""

import mlx.core as mx
import pytest

from tests.toy_training import toy_trainer, trained
from workbench.errors import ConfigError, MemoryWarning
from workbench.probes.guard import FINE, OVER, TIGHT, MemoryGuard
from workbench.probes.memory import MemoryReading, read_memory, release_memory
from workbench.runs.commits import verify_folder
from workbench.tuning import memory_watch, reporting

HUGE = 10**15


def reading(process_bytes, available_bytes=None):
    return MemoryReading(0, 0, 0, process_bytes, available_bytes)


@pytest.mark.parametrize(
    ("process_bytes", "verdict"), [(799, FINE), (800, TIGHT), (999, TIGHT), (1000, OVER)]
)
def test_own_limit(process_bytes, verdict):
    assert MemoryGuard(1000).verdict(reading(process_bytes)) == verdict


@pytest.mark.parametrize(
    ("process_bytes", "available_bytes", "verdict"),
    [(500, 500, FINE), (770, 230, TIGHT), (900, 100, TIGHT), (950, 50, OVER), (999, 1, OVER)],
)
def test_limit_of_the_machine_follows_what_is_available(process_bytes, available_bytes, verdict):
    assert MemoryGuard().verdict(reading(process_bytes, available_bytes)) == verdict


@pytest.mark.parametrize(
    ("guard", "known"),
    [
        (MemoryGuard(), reading(None, 5)),
        (MemoryGuard(), reading(5, None)),
        (MemoryGuard(10), reading(None, None)),
        (MemoryGuard(0), reading(HUGE, 0)),
    ],
)
def test_missing_counters_and_no_guard_are_fine(guard, known):
    assert guard.verdict(known) == FINE
    assert guard.explain(known)


@pytest.mark.parametrize("limit", [-1, 1.5, True, "1 GB"])
def test_impossible_limits_are_refused(limit):
    with pytest.raises(ConfigError, match="limit_bytes must be a whole number"):
        MemoryGuard(limit)
    with pytest.raises(ConfigError, match="memory_limit_bytes must be a whole number"):
        toy_trainer(memory_limit_bytes=limit)


def test_tight_memory_empties_the_cache_warns_once_and_goes_on():
    release_memory()
    trainer = toy_trainer(epochs=2, memory_limit_bytes=int(read_memory().process_bytes / 0.9))
    with pytest.warns(MemoryWarning, match=r"9\d% of the limit.*cache is emptied") as caught:
        cached = [mx.get_cache_memory() for _ in trainer]
    assert trainer.finished
    assert not any(cached)
    assert len(caught) == 1


def test_over_the_limit_it_checkpoints_and_stops_after_a_whole_step(tmp_path):
    trainer = toy_trainer(epochs=2, memory_limit_bytes=1000, run_dir=tmp_path)
    with pytest.warns(MemoryWarning, match=r"stopped: the process holds .*checkpoint in .*step-"):
        assert len(list(trainer)) == 1
    assert "memory" in trainer.stop_reason
    assert trainer.steps_done == 1
    verify_folder(tmp_path / "checkpoints" / "step-000001")


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped():
    whole, stopped = toy_trainer(epochs=2), toy_trainer(epochs=2, memory_limit_bytes=1000)
    list(whole)
    with pytest.warns(MemoryWarning):
        list(stopped)
    stopped.guard = MemoryGuard()
    list(stopped)
    assert stopped.finished
    assert not stopped.stop_reason
    ours, theirs = trained(stopped), trained(whole)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def with_readings(monkeypatch, after_steps, after_release):
    """Have the trainer read given figures: after its steps, and after releasing memory."""
    steps = iter(after_steps)
    monkeypatch.setattr(reporting, "read_memory", lambda: next(steps))
    monkeypatch.setattr(memory_watch, "read_memory", lambda: after_release)


def test_emptying_the_cache_may_be_enough(monkeypatch):
    trainer = toy_trainer(epochs=1, memory_limit_bytes=10 * read_memory().process_bytes)
    high, low = MemoryReading(0, 0, 0, HUGE, 0), read_memory()
    with_readings(monkeypatch, [high, *[low] * 10], low)
    with pytest.warns(MemoryWarning, match="cache is emptied"):
        list(trainer)
    assert trainer.finished


def test_a_step_that_needs_too_much_by_itself_stops_the_run(monkeypatch):
    trainer = toy_trainer(epochs=4, memory_limit_bytes=10 * read_memory().process_bytes)
    high, low = MemoryReading(0, 0, 0, HUGE, 0), read_memory()
    with_readings(monkeypatch, [high] * 10, low)  # each step is over, each release helps
    with pytest.warns(MemoryWarning, match="stopped"):
        list(trainer)
    assert trainer.steps_done == 2
