"""Numbers that go wrong: named, skipped within bounds, spikes flagged, early stopping."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from tests.toy_training import RAGGED, FailAt, computed, state_of, toy_trainer, trained
from workbench.errors import ConfigError, NotFiniteError, RunError, TrainingError
from workbench.models.files import read_json
from workbench.tuning import reporting
from workbench.tuning.checkpoints import list_checkpoints
from workbench.tuning.losses import supervised_loss
from workbench.tuning.progress import Progress, is_spike

pytestmark = pytest.mark.fault("numeric")


def poisoned(*rows, value=math.nan):
    """A loss that is not finite for batches that hold certain rows."""

    def loss_fn(model, batch):
        loss = supervised_loss(model, batch)
        return loss * value if set(rows) & set(batch.rows) else loss

    return loss_fn


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_by_default_a_bad_step_raises_and_names_rows_and_parameters(value):
    trainer = toy_trainer(micro_batch_size=8, loss_fn=poisoned(3, value=value))
    before = state_of(trainer)
    with pytest.raises(NotFiniteError, match=r"step 1 gave loss .*toy row 3.*lora_") as caught:
        trainer.step()
    assert isinstance(caught.value, TrainingError)
    assert state_of(trainer) == before


def test_a_skipped_step_changes_nothing_and_the_run_goes_on(tmp_path):
    trainer = toy_trainer(
        micro_batch_size=1, epochs=2, loss_fn=poisoned(3), on_bad_step="skip", run_dir=tmp_path
    )
    for _ in range(trainer.total_steps):
        before = state_of(trainer)
        report = trainer.step()
        rows = trainer.plan.micro_batches(report.step - 1)[0]
        assert report.skipped == (3 in rows)
        assert (state_of(trainer) == before) == report.skipped
    assert trainer.finished
    assert trainer.progress.bad_steps == 2
    assert sum(math.isnan(report.loss) for report in trainer.reports) == 2
    assert all(mx.isfinite(mx.array(array)).all() for array in trained(trainer).values())


def test_skipping_has_a_bound():
    trainer = toy_trainer(
        micro_batch_size=1, epochs=3, loss_fn=poisoned(3), on_bad_step="skip", max_bad_steps=1
    )
    with pytest.raises(NotFiniteError):
        list(trainer)
    assert trainer.progress.bad_steps == 1
    assert sum(report.skipped for report in trainer.reports) == 1


def test_skipped_steps_are_counted_on_after_a_resume(tmp_path):
    settings = {"micro_batch_size": 1, "epochs": 3, "on_bad_step": "skip", "max_bad_steps": 2}
    whole = toy_trainer(loss_fn=poisoned(3), **settings)
    first = toy_trainer(loss_fn=poisoned(3), run_dir=tmp_path, checkpoint_every=1, **settings)
    for _ in range(len(RAGGED)):
        first.step()
    resumed = toy_trainer(loss_fn=poisoned(3), run_dir=tmp_path, checkpoint_every=1, **settings)
    assert resumed.progress.bad_steps == 1
    for trainer in (whole, resumed):
        with pytest.raises(NotFiniteError):
            list(trainer)
    # NaN is not equal to itself: compare the reports as text.
    assert [str(computed(r)) for r in resumed.reports] == [str(computed(r)) for r in whole.reports]


def test_a_checkpoint_is_never_written_from_weights_that_are_not_finite(tmp_path):
    trainer = toy_trainer(run_dir=tmp_path, epochs=2)
    trainer.step()
    kept = trainer.save_checkpoint()
    name = next(iter(trained(trainer)))
    module = trainer.model
    *path, leaf = name.split(".")
    for part in path:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    setattr(module, leaf, module[leaf] * math.nan)
    with pytest.raises(TrainingError, match=f"{name} is not finite.*No checkpoint"):
        trainer.save_checkpoint()
    assert list_checkpoints(tmp_path)[0] == kept
    assert read_json(kept / "state.json")["step"] == 1


@pytest.mark.parametrize(
    ("loss", "before", "expected"),
    [
        (9.0, [2.0, 2.1, 1.9, 2.2] * 4, True),
        (2.3, [2.0, 2.1, 1.9, 2.2] * 4, False),
        (9.0, [2.0, 2.1], False),  # too few to know
        (9.0, [2.0] * 16, True),
        (2.01, [2.0] * 16, False),
        (math.nan, [2.0] * 16, False),
        (9.0, [math.nan] * 16, False),
        (0.1, [2.0, 2.1, 1.9, 2.2] * 4, False),  # down is no spike
    ],
)
def test_spikes(loss, before, expected):
    assert is_spike(loss, before) is expected


def test_a_spike_is_flagged_in_its_report():
    trainer = toy_trainer(micro_batch_size=8, steps=24, learning_rate=1e-4)
    for _ in range(20):
        assert not trainer.step().spike
    trainer.loss_fn = FailAt(1, lambda loss: 3 * loss)
    assert trainer.step().spike
    assert not trainer.step().spike


def test_no_improvement_stops_the_run(monkeypatch):
    losses = iter([3.0, 2.0, 2.5, math.nan, 2.1, 1.0])
    trainer = toy_trainer(valid=[9], epochs=6, valid_every=1, patience=3)
    monkeypatch.setattr(reporting, "mean_measures", lambda *a, **k: (next(losses), {}))
    list(trainer)
    assert trainer.steps_done == 5
    assert trainer.stop_reason == "no better validation in 3"
    assert trainer.progress == Progress(best_loss=2.0, best_step=2, without_improvement=3)


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [({"valid": [9]}, "no valid_every"), ({"valid_every": 1}, "no validation rows")],
)
def test_patience_that_would_count_nothing_is_refused(settings, lacks):
    with pytest.raises(ConfigError, match=f"patience 3 counts validations, and there is {lacks}"):
        toy_trainer(patience=3, **settings)


def test_the_best_weights_come_back(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.0])
    trainer = toy_trainer(valid=[9], epochs=2, valid_every=1, run_dir=tmp_path)
    monkeypatch.setattr(reporting, "mean_measures", lambda *a, **k: (next(losses), {}))
    best = None
    for report in trainer:
        best = trained(trainer) if report.step == 2 else best
    last = trained(trainer)
    assert trainer.load_best() == 2
    now = trained(trainer)
    assert all((now[name] == best[name]).all() for name in best)
    assert any((now[name] != last[name]).any() for name in best)


def test_without_a_validation_there_is_no_best(tmp_path):
    trainer = toy_trainer(run_dir=tmp_path)
    trainer.step()
    with pytest.raises(RunError, match=r"no validation.*valid_every"):
        trainer.load_best()


@pytest.mark.parametrize(
    "settings",
    [{"on_bad_step": "ignore"}, {"max_bad_steps": -1}, {"patience": -1}, {"keep_checkpoints": 0}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        toy_trainer(**settings)
