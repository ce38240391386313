"""Stop, change the learning rate, checkpoint: between two steps."""

import threading

import mlx.core as mx
import pytest

from tests.toy_training import computed, toy_trainer, trained
from workbench.errors import ConfigError, RunError
from workbench.models.files import read_json, read_safetensors
from workbench.runs import commits
from workbench.runs.commits import verify_folder
from workbench.tuning.losses import supervised_loss


def test_stop_ends_the_loop_after_the_step_and_the_next_loop_goes_on():
    whole, trainer = toy_trainer(epochs=3), toy_trainer(epochs=3)
    list(whole)
    for report in trainer:
        if report.step == 2:
            trainer.stop("enough")
    assert trainer.steps_done == 2
    assert trainer.stop_reason == "enough"
    list(trainer)
    assert trainer.finished
    assert list(map(computed, trainer.reports)) == list(map(computed, whole.reports))


def test_stop_may_come_from_another_thread():
    trainer = toy_trainer(epochs=3)
    for _ in trainer:
        thread = threading.Thread(target=trainer.stop)
        thread.start()
        thread.join()
    assert trainer.steps_done == 1


def test_session_sets_the_cache_limit_and_brings_the_old_one_back():
    previous = mx.set_cache_limit(123_456)
    try:
        trainer = toy_trainer(epochs=1, cache_limit_bytes=0)
        with trainer.session():
            trainer.step()
            assert mx.get_cache_memory() == 0
        assert mx.set_cache_limit(123_456) == 123_456
    finally:
        mx.set_cache_limit(previous)


def test_new_learning_rate_takes_effect_at_the_next_step():
    trainer, slower = toy_trainer(epochs=3, schedule="cosine"), toy_trainer(epochs=3)
    trainer.step()
    before = [trainer.learning_rate(step) for step in range(trainer.total_steps)]
    trainer.peak_learning_rate /= 4
    report = trainer.step()
    assert report.learning_rate == pytest.approx(before[1] / 4)
    after = [trainer.learning_rate(step) for step in range(trainer.total_steps)]
    assert after == pytest.approx([rate / 4 for rate in before])
    for _ in range(2):
        slower.step()
    assert any((trained(slower)[name] != array).any() for name, array in trained(trainer).items())


def test_a_peak_below_the_floor_lowers_the_floor():
    trainer = toy_trainer(epochs=2, learning_rate=1e-2, min_learning_rate=1e-3)
    trainer.peak_learning_rate = 1e-5
    rates = [trainer.learning_rate(step) for step in range(trainer.total_steps)]
    assert max(rates) <= 1e-5


def test_another_loss_takes_effect_at_the_next_step():
    trainer, plain = toy_trainer(epochs=2), toy_trainer(epochs=2)
    trainer.step()
    plain.step()
    trainer.loss_fn = lambda model, batch: 3 * supervised_loss(model, batch)
    assert trainer.step().loss == pytest.approx(3 * plain.step().loss)


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf"), "1e-3", None, True])
def test_impossible_learning_rates_are_refused_and_change_nothing(rate):
    trainer = toy_trainer()
    with pytest.raises(ConfigError, match="peak_learning_rate must be a number"):
        trainer.peak_learning_rate = rate
    assert trainer.peak_learning_rate == 1e-2


def test_checkpoint_holds_what_trains_and_the_optimizers_state(tmp_path):
    trainer = toy_trainer(epochs=2, run_dir=tmp_path)
    trainer.step()
    trainer.peak_learning_rate = 5e-3
    folder = trainer.save_checkpoint()
    verify_folder(folder)
    weights = read_safetensors(folder / "trainable.safetensors")
    expected = trained(trainer)
    assert weights.keys() == expected.keys()
    assert all((weights[name] == mx.array(expected[name])).all() for name in expected)
    moments = read_safetensors(folder / "optimizer.safetensors")
    assert moments["step"].item() == 1
    assert len(moments) == 2 + 2 * len(expected)
    state = read_json(folder / "state.json")
    assert (state["step"], state["peak_learning_rate"]) == (1, 5e-3)


def test_checkpoint_of_the_same_step_replaces_the_first(tmp_path):
    trainer = toy_trainer(epochs=2, run_dir=tmp_path)
    trainer.step()
    assert trainer.save_checkpoint() == trainer.save_checkpoint()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000000", "step-000001"]


def test_checkpoint_without_a_run_folder_is_refused():
    with pytest.raises(RunError, match=r"needs a run folder.*run_dir"):
        toy_trainer().save_checkpoint()


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    trainer = toy_trainer(epochs=2, run_dir=tmp_path)
    trainer.step()
    first = trainer.save_checkpoint()
    trainer.step()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commits, "_force_to_disk", full)
    with pytest.raises(RunError, match=r"step-000002.*No space left"):
        trainer.save_checkpoint()
    verify_folder(first)
    assert sorted(path.name for path in first.parent.iterdir()) == ["step-000000", first.name]
    trainer.step()  # the trainer goes on
