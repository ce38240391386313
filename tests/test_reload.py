"""The reload cycle: everything dropped and read again, and the run equal to the bit."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.toy import save_toy_folder, toy_dataset
from tests.toy_training import RAGGED, computed, state_of
from workbench.errors import ConfigError, RunError, TrainingError
from workbench.models.loading import load_model
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.trainer import Trainer


@pytest.fixture
def folder(tmp_path):
    return save_toy_folder(tmp_path / "model")


def trainer_on(folder, run_dir=None, dropout=0.2, full=False, **settings):
    base = load_model(folder)
    if not full:
        add_lora(base.model, LoRAConfig(rank=4, dropout=dropout))
    config = TrainConfig(micro_batch_size=2, learning_rate=1e-2, epochs=3, **settings)
    return Trainer(base, toy_dataset(RAGGED), config, run_dir)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_a_reloaded_run_equals_the_one_that_was_not(every, full, folder, tmp_path):
    whole = trainer_on(folder, full=full)
    list(whole)
    reloaded = trainer_on(folder, tmp_path / "run", full=full, reload_every=every)
    list(reloaded)
    assert list(map(computed, reloaded.reports)) == [
        {**computed(report), "released_bytes": mine.released_bytes}
        for report, mine in zip(whole.reports, reloaded.reports)
    ]
    assert state_of(reloaded) == state_of(whole)
    cycles = [r.step for r in reloaded.reports if r.released_bytes is not None]
    assert cycles == list(range(1 + every, whole.total_steps + 1, every))


def test_a_threshold_brings_a_reload_about_but_not_at_every_step(folder, tmp_path):
    trainer = trainer_on(folder, tmp_path / "run", reload_above_bytes=1)
    list(trainer)
    assert [r.step for r in trainer.reports if r.released_bytes is not None] == [11]


def test_zero_never_reloads(folder, tmp_path):
    trainer = trainer_on(folder, tmp_path / "run")
    list(trainer)
    assert all(report.released_bytes is None for report in trainer.reports)


def test_modules_stay_the_same_objects_and_arrays_are_new(folder, tmp_path):
    trainer = trainer_on(folder, tmp_path / "run")
    trainer.step()
    modules = dict(trainer.model.named_modules())
    arrays = dict(tree_flatten(trainer.model.parameters()))
    trainer.reload()
    assert all(dict(trainer.model.named_modules())[n] is m for n, m in modules.items())
    for name, array in tree_flatten(trainer.model.parameters()):
        assert array is not arrays[name], name
        assert mx.array_equal(array, arrays[name]), name


def test_a_reload_without_a_run_folder_is_refused(folder):
    with pytest.raises(ConfigError, match="reload needs a run folder"):
        trainer_on(folder, reload_every=2)
    with pytest.raises(RunError, match="reload needs a run folder"):
        trainer_on(folder).reload()


def test_files_that_are_gone_are_told_before_anything_is_dropped(folder, tmp_path):
    trainer = trainer_on(folder, tmp_path / "run")
    trainer.step()
    before = state_of(trainer)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match=r"cannot be reloaded: .* is gone"):
        trainer.reload()
    assert state_of(trainer) == before


def test_files_that_changed_are_told(folder, tmp_path):
    trainer = trainer_on(folder, tmp_path / "run")
    trainer.step()
    save_toy_folder(folder, seed=5)
    with pytest.raises(TrainingError, match="not what was loaded"):
        trainer.reload()
