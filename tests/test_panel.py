"""The panel trains as a plain loop does, obeys between two steps, and breaks nothing."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from tests.toy_panel import RecordingView, watch
from tests.toy_training import FailAt, computed, fail, interrupt, toy_trainer, trained
from workbench.errors import ConfigError, DataError, RunError, TrainingError
from workbench.live.panel import LivePanel
from workbench.live.samples import read_samples
from workbench.runs.store import read_rows

PROMPTS = ["What <b>is</b> $x$?", "And \x1b[31mred?"]


def test_watching_changes_nothing_in_the_training():
    settings = {"steps": 8, "valid": [9, 12], "valid_every": 3, "dropout": 0.3}
    plain, watched = toy_trainer(**settings), toy_trainer(**settings)
    list(plain)
    watch(LivePanel(watched, PROMPTS, sample_every=2, max_new_tokens=4))
    assert [computed(r) for r in watched.reports] == [computed(r) for r in plain.reports]
    expected = trained(plain)
    assert all((array == expected[name]).all() for name, array in trained(watched).items())


def test_watch_returns_the_reports_of_this_call_and_goes_on_after_a_stop():
    trainer = toy_trainer(steps=9)
    panel = LivePanel(trainer)
    view = watch(panel, {4: panel.stop})
    assert trainer.steps_done == 4
    assert view.closed.status.state == "Stopped by request"
    assert view.closed.status.remaining is None
    rest = asyncio.run(panel.watch())
    assert [report.step for report in rest] == [5, 6, 7, 8, 9]
    assert trainer.finished


def test_reports_as_a_cells_last_value_show_nothing():
    reports = asyncio.run(LivePanel(toy_trainer(steps=1)).watch())
    assert reports._ipython_display_() is None


def test_pause_holds_the_steps_and_its_time_does_not_count():
    trainer = toy_trainer(steps=6)
    panel, view = LivePanel(trainer), RecordingView()
    panel._choose_view = lambda: view
    view.acts = {3: panel.pause}

    async def scene() -> tuple[int, int, int]:
        task = asyncio.create_task(panel.watch())
        while not panel.paused:
            await asyncio.sleep(0.01)
        held = []
        for _ in range(2):
            await asyncio.sleep(0.2)
            held.append(trainer.steps_done)
        panel.resume()
        await task
        return (*held, trainer.steps_done)

    started = time.perf_counter()
    assert asyncio.run(scene()) == (3, 3, 6)
    assert ("Paused", 3) in view.states
    assert panel.seconds < time.perf_counter() - started - 0.35


def test_stop_ends_a_pause():
    panel = LivePanel(toy_trainer(steps=6))
    view = RecordingView({2: panel.pause})
    panel._choose_view = lambda: view

    async def scene() -> None:
        task = asyncio.create_task(panel.watch())
        while not panel.paused:
            await asyncio.sleep(0.01)
        panel.stop()
        await asyncio.wait_for(task, 5)

    asyncio.run(scene())
    assert panel.trainer.steps_done == 2


def test_a_new_learning_rate_holds_from_the_next_step():
    trainer = toy_trainer(steps=6, schedule="constant", learning_rate=1e-3)
    panel = LivePanel(trainer)
    view = watch(panel, {3: lambda: panel.set_learning_rate(0.5)})
    assert [report.learning_rate for report in trainer.reports] == [1e-3] * 3 + [0.5] * 3
    assert view.notes[-1] == "peak learning rate 0.5 from step 4"


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "fast"])
def test_a_learning_rate_that_is_none_is_refused_and_training_goes_on(wrong):
    trainer = toy_trainer(steps=4, schedule="constant", learning_rate=1e-3)
    panel = LivePanel(trainer)
    view = watch(panel, {2: lambda: panel.set_learning_rate(wrong)})
    assert {report.learning_rate for report in trainer.reports} == {1e-3}
    assert trainer.finished
    assert repr(wrong) in view.notes[-1]


def test_checkpoint_now_says_where(tmp_path):
    trainer = toy_trainer(steps=4, run_dir=tmp_path / "run", keep_checkpoints=9)
    panel = LivePanel(trainer)
    view = watch(panel, {2: panel.checkpoint})
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    assert str(saved) in view.notes[-1]
    assert (saved / "manifest.json").is_file()


def test_a_checkpoint_that_cannot_be_written_ends_nothing():
    panel = LivePanel(toy_trainer(steps=4))
    view = watch(panel, {2: panel.checkpoint})
    assert panel.trainer.finished
    assert "run_dir" in view.notes[-1]


def test_a_wish_of_the_last_moment_is_granted(tmp_path):
    panel = LivePanel(toy_trainer(steps=3, run_dir=tmp_path / "run"))
    view = watch(panel, {3: panel.checkpoint})
    assert "checkpoint written" in view.closed.status.note


def test_a_step_that_fails_ends_with_the_last_picture_and_its_error():
    trainer = toy_trainer(steps=6, loss_fn=FailAt(4, fail))
    panel = LivePanel(trainer)
    view = RecordingView()
    panel._choose_view = lambda: view
    with pytest.raises(RuntimeError, match="planted"):
        asyncio.run(panel.watch())
    assert view.closed.status.state == "Failed: planted"
    assert len(view.closed.history) == trainer.steps_done
    assert trainer.step().step == trainer.steps_done, "the trainer is as it was"
    watch(LivePanel(trainer))
    assert trainer.finished


def test_an_interrupt_of_a_program_is_raised_when_the_picture_is_drawn():
    panel = LivePanel(toy_trainer(steps=6, loss_fn=FailAt(5, interrupt)))
    view = RecordingView()
    panel._choose_view = lambda: view
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(panel.watch())
    assert view.closed.status.state == "Stopped: interrupted"
    assert len(view.closed.history) == panel.trainer.steps_done
    assert panel.trainer.step()


def test_a_programs_cancelled_task_is_cancelled():
    panel = LivePanel(toy_trainer(steps=100))
    view = RecordingView({2: panel.pause})
    panel._choose_view = lambda: view

    async def scene() -> None:
        await asyncio.wait_for(panel.watch(), 0.5)

    with pytest.raises(TimeoutError):
        asyncio.run(scene())
    assert view.closed.status.state == "Stopped: interrupted"


def test_two_panels_on_one_trainer_at_once_are_refused():
    trainer = toy_trainer(steps=30)
    panels = [LivePanel(trainer), LivePanel(trainer)]
    for panel in panels:
        panel._choose_view = RecordingView

    async def scene() -> list:
        return await asyncio.gather(*(p.watch() for p in panels), return_exceptions=True)

    first, second = asyncio.run(scene())
    assert len(first) == 30
    with pytest.raises(TrainingError, match="another panel"):
        raise second
    asyncio.run(panels[1].watch())  # once the first has ended


def test_a_finished_trainer_is_shown_and_not_trained():
    trainer = toy_trainer(steps=2)
    list(trainer)
    before = trained(trainer)
    view = watch(LivePanel(trainer))
    assert len(view.closed.history) == 2
    assert "made before" in view.closed.status.note
    assert all((array == before[name]).all() for name, array in trained(trainer).items())


def test_samples_come_at_the_steps_that_were_chosen_and_are_kept(tmp_path):
    trainer = toy_trainer(steps=7, run_dir=tmp_path / "run")
    panel = LivePanel(trainer, PROMPTS, sample_every=3, max_new_tokens=4)
    view = watch(panel)
    assert [s.step for s in panel.samples] == [0, 0, 3, 3, 6, 6, 7, 7]
    assert [s.prompt for s in panel.samples[:2]] == PROMPTS
    assert read_samples(tmp_path / "run") == panel.samples
    assert len(read_rows(tmp_path / "run", "samples.jsonl")) == 8
    assert "&lt;b&gt;is&lt;/b&gt;" in view.closed.samples
    assert "<b>is" not in view.closed.samples
    assert LivePanel(trainer).samples == panel.samples, "a second panel knows them"


def test_a_sample_that_cannot_be_kept_ends_nothing(tmp_path):
    trainer = toy_trainer(steps=3, run_dir=tmp_path / "run")
    (tmp_path / "run" / "samples.jsonl").mkdir()
    with pytest.raises(RunError):
        LivePanel(trainer, PROMPTS)
    (tmp_path / "run" / "samples.jsonl").rmdir()
    panel = LivePanel(trainer, PROMPTS, max_new_tokens=2)
    (tmp_path / "run" / "samples.jsonl").mkdir()
    view = watch(panel)
    assert trainer.finished
    assert "samples.jsonl" in view.notes[-1]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"sample_every": -1}, ConfigError),
        ({"sample_every": 1.5}, ConfigError),
        ({"max_new_tokens": 0}, ConfigError),
        ({"controls": "yes"}, ConfigError),
        ({"prompts": ["x" * 9999]}, DataError),
    ],
)
def test_bad_settings_are_refused_before_training(settings, error):
    with pytest.raises(error):
        LivePanel(toy_trainer(steps=1), **settings)


def test_controls_cannot_be_had_without_a_notebook():
    trainer = toy_trainer(steps=2)
    with pytest.raises(ConfigError, match="notebook"):
        asyncio.run(LivePanel(trainer, controls=True).watch())
    asyncio.run(LivePanel(trainer).watch())
    assert trainer.finished


def test_a_program_shows_one_line_on_standard_error(capsys, tmp_path):
    trainer = toy_trainer(steps=3, run_dir=tmp_path / "a\x1b[31m")
    panel = LivePanel(trainer)
    panel.checkpoint()
    asyncio.run(panel.watch())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Finished · step 3/3" in shown.err
    assert "checkpoint written" in shown.err
    assert "\x1b" not in shown.err.replace("\x1b[A", "")
    assert shown.err.count("\n") == 1
