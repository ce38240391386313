"""A run that was stopped goes on as if it had not been, or says why it cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import warnings

import mlx.core as mx
import pytest

from tests.process import finish, start
from tests.toy import toy_dataset, toy_model
from tests.toy_architectures import small_base, small_rows
from tests.toy_training import RAGGED, FailAt, computed, state_of, toy_trainer
from workbench.data.datasets import Dataset
from workbench.errors import FileFormatError, ResumeWarning, RunError, WeightsError
from workbench.models.files import read_json, write_json
from workbench.runs import lock
from workbench.runs.commits import MANIFEST_NAME
from workbench.tuning import identity, reporting, resuming
from workbench.tuning.checkpoints import list_checkpoints, read_checkpoint
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import add_lora
from workbench.tuning.trainer import Trainer

SETTINGS = {
    "cosine": {},
    "linear, warm-up": {"schedule": "linear", "warmup_steps": 3},
    "constant": {"schedule": "constant", "weight_decay": 0.0},
    "floor": {"min_learning_rate": 1e-3},
    "dropout": {"dropout": 0.3},
    "accumulation": {"micro_batch_size": 1, "grad_accum_steps": 3},
    "accumulation, dropout": {"micro_batch_size": 2, "grad_accum_steps": 2, "dropout": 0.5},
    "no clipping": {"max_grad_norm": 0},
    "tight clipping": {"max_grad_norm": 0.01},
    "full": {"full": True},
    "full, accumulation": {"full": True, "micro_batch_size": 1, "grad_accum_steps": 2},
    "validation": {"valid": [9, 14], "valid_every": 1},
    "another seed": {"seed": 7},
    "other betas": {"adam_betas": (0.5, 0.9), "adam_epsilon": 1e-4},
    "one row a step": {"micro_batch_size": 1},
    "checkpoint every step": {"checkpoint_every": 1},
}


def assert_same_run(ours, theirs):
    assert list(map(computed, ours.reports)) == list(map(computed, theirs.reports))
    assert state_of(ours) == state_of(theirs)


def stopped_after(steps, folder, **settings):
    """A run that was stopped after some steps; nothing of it is left but its folder."""
    trainer = toy_trainer(run_dir=folder, **settings)
    for report in trainer:
        if report.step == steps:
            trainer.stop()
    return trainer


@pytest.mark.fault("resume equality")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_equals_the_uninterrupted_one(name, steps, tmp_path):
    settings = {"epochs": 3, **SETTINGS[name]}
    whole = toy_trainer(**settings)
    list(whole)
    stopped_after(steps, tmp_path, **settings)
    resumed = toy_trainer(run_dir=tmp_path, **settings)
    assert resumed.steps_done == steps
    list(resumed)
    assert_same_run(resumed, whole)


def test_metrics_hold_every_step_once(tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    resumed = toy_trainer(run_dir=tmp_path, epochs=3)
    list(resumed)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, resumed.total_steps + 1))


def test_steps_after_the_newest_checkpoint_are_made_again(tmp_path):
    whole = toy_trainer(epochs=3)
    list(whole)
    left = toy_trainer(run_dir=tmp_path, epochs=3, checkpoint_every=2)
    for _ in range(3):
        left.step()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # and killed there
    resumed = toy_trainer(run_dir=tmp_path, epochs=3, checkpoint_every=2)
    assert resumed.steps_done == 2
    list(resumed)
    assert_same_run(resumed, whole)


def test_a_changed_learning_rate_comes_back(tmp_path):
    whole = toy_trainer(epochs=3)
    first = toy_trainer(run_dir=tmp_path, epochs=3)
    for trainer in (whole, first):
        trainer.step()
        trainer.peak_learning_rate = 3e-3
    first.save_checkpoint()
    resumed = toy_trainer(run_dir=tmp_path, epochs=3)
    list(whole)
    list(resumed)
    assert_same_run(resumed, whole)


def test_a_finished_run_is_finished(tmp_path):
    whole = toy_trainer(run_dir=tmp_path, epochs=2)
    list(whole)
    again = toy_trainer(run_dir=tmp_path, epochs=2)
    assert again.finished
    assert list(again) == []
    assert_same_run(again, whole)


def test_a_cell_that_runs_twice_goes_on_and_the_earlier_trainer_writes_no_more(tmp_path):
    first = toy_trainer(run_dir=tmp_path, epochs=2)
    first.step()
    first.save_checkpoint()
    second = toy_trainer(run_dir=tmp_path, epochs=2)
    assert second.step().step == 2
    with pytest.raises(RunError, match="taken over by a later trainer"):
        first.step()


def damage_weights(folder):
    path = folder / "trainable.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate_optimizer(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def remove_manifest(folder):
    (folder / MANIFEST_NAME).unlink()


def empty_state(folder):
    (folder / "state.json").write_text("")


def remove_weights(folder):
    (folder / "trainable.safetensors").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_weights, truncate_optimizer, remove_manifest, empty_state, remove_weights],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path):
    whole = toy_trainer(epochs=3)
    list(whole)
    stopped_after(3, tmp_path, epochs=3, checkpoint_every=1)
    damage(list_checkpoints(tmp_path)[0])
    with pytest.warns(ResumeWarning, match="step-000003"):
        resumed = toy_trainer(run_dir=tmp_path, epochs=3, checkpoint_every=1)
    assert resumed.steps_done == 2
    list(resumed)
    assert_same_run(resumed, whole)


def test_without_any_whole_checkpoint_nothing_is_overwritten(tmp_path):
    stopped_after(3, tmp_path, epochs=3)
    for folder in list_checkpoints(tmp_path):
        damage_weights(folder)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.warns(ResumeWarning), pytest.raises(RunError, match="3 steps of a run, but no"):
        toy_trainer(run_dir=tmp_path, epochs=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_unknown_version_is_refused(tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    path = list_checkpoints(tmp_path)[0] / "state.json"
    write_json(path, {**read_json(path), "version": 99})
    with pytest.raises(RunError, match="version 99, this workbench reads 1"):
        toy_trainer(run_dir=tmp_path, epochs=3)


CHANGES = {
    "learning_rate is 0.02, was 0.01": {"learning_rate": 0.02},
    "epochs is 4, was 3": {"epochs": 4},
    "seed is 1, was 0": {"seed": 1},
    "training data is another": {"data": toy_dataset([*RAGGED[:-1], 19])},
    "validation data is another": {"valid": [8]},
    "what trains is another": {"full": True},
}


@pytest.mark.parametrize("told", CHANGES)
def test_another_run_is_refused_and_told_apart(told, tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    with pytest.raises(RunError, match=f"{told}.*allow_changes"):
        toy_trainer(run_dir=tmp_path, **{"epochs": 3, **CHANGES[told]})
    resumed = toy_trainer(run_dir=tmp_path, epochs=3)  # nothing was lost
    assert resumed.steps_done == 2


def test_another_base_model_is_refused(tmp_path, monkeypatch):
    stopped_after(2, tmp_path, epochs=3)
    monkeypatch.setattr("tests.toy.toy_model", lambda seed, **_: toy_model(seed + 1))
    with pytest.raises(RunError, match="the base model is another"):
        toy_trainer(run_dir=tmp_path, epochs=3)


OTHER_SETUPS = {
    "num_attention_heads is 2, was 4": {
        "network": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    },
    "rope_theta is 50000, was 10000": {"network": {"rope_theta": 50_000.0}},
    "rms_norm_eps is 0.1, was 1e-05": {"network": {"rms_norm_eps": 0.1}},
    r"scale is 200, was 4; alpha \(scale × rank\) is 800, was 16": {"adapter": {"alpha": 800}},
    "scale is 8, was 4": {"adapter": {"use_rslora": True}},
    "dropout is 0.5, was 0": {"dropout": 0.5},
    "kind is 'DoRA', was 'LoRA'": {"adapter": {"use_dora": True}},
    "rank is 8, was 4": {"adapter": {"rank": 8}},
}


@pytest.mark.parametrize("told", OTHER_SETUPS)
def test_the_same_weights_in_another_network_or_adapter_are_another_run(told, tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    with pytest.raises(RunError, match=f"{told}.*allow_changes"):
        toy_trainer(run_dir=tmp_path, epochs=3, **OTHER_SETUPS[told])
    assert toy_trainer(run_dir=tmp_path, epochs=3).steps_done == 2


def test_a_network_that_trains_as_a_whole_is_compared_too(tmp_path):
    stopped_after(2, tmp_path, epochs=3, full=True)
    with pytest.raises(RunError, match="one: rope_theta is 50000, was 10000\\. "):
        toy_trainer(run_dir=tmp_path, epochs=3, full=True, network={"rope_theta": 50_000.0})


def test_the_settings_of_a_network_that_mlx_lm_built_are_compared_too(tmp_path):
    def trainer(**changes):
        base = small_base("qwen2")
        base.config = dataclasses.replace(base.config, **changes)
        add_lora(base.model)
        return Trainer(base, Dataset("toy", small_rows([7, 12])), TrainConfig(steps=2), tmp_path)

    trainer().step()
    with pytest.raises(RunError, match="one: rope_theta is 5000, was "):
        trainer(rope_theta=5000.0)
    assert trainer().steps_done == 0  # the checkpoint of the start


def test_another_seed_of_the_adapter_is_the_same_run(tmp_path):
    whole = toy_trainer(epochs=3)
    list(whole)
    stopped_after(2, tmp_path, epochs=3)
    resumed = toy_trainer(run_dir=tmp_path, epochs=3, adapter={"seed": 5})
    list(resumed)
    assert_same_run(resumed, whole)


def test_layers_that_are_adapted_otherwise_than_others_are_compared_one_by_one(tmp_path):
    def scaled(number):
        trainer = toy_trainer(epochs=3)
        trainer.model.model.layers[number].mlp.up_proj.scale = 1.0
        return trainer

    first, again, other = (identity.adapter_settings(scaled(n).model) for n in (0, 0, 1))
    assert first == again != other
    assert sorted(set(first["scale"])) == [1.0, 4.0]
    assert (first["kind"], first["rank"]) == ("LoRA", 4)


@contextlib.contextmanager
def older_version(monkeypatch, module, name, unknown):
    """A time when a function of a module did not yet give some of its entries."""
    known = getattr(module, name)
    with monkeypatch.context() as patch:
        patch.setattr(
            module,
            name,
            lambda *given: {k: v for k, v in known(*given).items() if k not in unknown},
        )
        yield


def test_a_run_from_before_network_and_adapter_were_kept_goes_on(tmp_path, monkeypatch):
    with older_version(monkeypatch, resuming, "identity", {"network", "adapter"}):
        stopped_after(2, tmp_path, epochs=3)
    assert toy_trainer(run_dir=tmp_path, epochs=3).steps_done == 2


def test_allowed_changes_are_recorded(tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    resumed = toy_trainer(run_dir=tmp_path, epochs=3, learning_rate=0.02, allow_changes=True)
    list(resumed)
    state = read_checkpoint(list_checkpoints(tmp_path)[0]).state
    assert state["changes"] == [{"step": 2, "differences": ["learning_rate is 0.02, was 0.01"]}]


def test_an_allowed_learning_rate_is_used(tmp_path):
    stopped_after(2, tmp_path, epochs=3, schedule="constant")
    settings = {"epochs": 3, "schedule": "constant", "learning_rate": 0.02}
    resumed = toy_trainer(run_dir=tmp_path, **settings, allow_changes=True)
    resumed.step()
    assert resumed.reports[-1].learning_rate == 0.02
    resumed.save_checkpoint()
    assert toy_trainer(run_dir=tmp_path, **settings).step().learning_rate == 0.02


def test_what_trains_must_fit_even_if_changes_are_allowed(tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    with pytest.raises(WeightsError, match="differs from what trains here"):
        toy_trainer(run_dir=tmp_path, epochs=3, full=True, allow_changes=True)


def test_limits_may_change_freely(tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_trainer(run_dir=tmp_path, epochs=3, cache_limit_bytes=0, checkpoint_every=7)


def test_a_run_from_before_a_setting_was_known_had_its_default(tmp_path, monkeypatch):
    with older_version(monkeypatch, identity, "_settings", {"fused_loss", "adam_betas"}):
        stopped_after(2, tmp_path, epochs=3)
    assert toy_trainer(run_dir=tmp_path, epochs=3).steps_done == 2
    with pytest.raises(RunError, match="fused_loss is True, was None"):
        toy_trainer(run_dir=tmp_path, epochs=3, fused_loss=True)


def test_another_environment_is_said_to_be_not_bit_for_bit(tmp_path, monkeypatch):
    stopped_after(2, tmp_path, epochs=3)
    monkeypatch.setattr(identity.mx, "__version__", "9.9")
    with pytest.warns(ResumeWarning, match=r"not bit for bit: mlx was .*, is 9\.9"):
        toy_trainer(run_dir=tmp_path, epochs=3)


def test_missing_metrics_are_refused(tmp_path):
    stopped_after(2, tmp_path, epochs=3)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="lacks rows of the 2 steps"):
        toy_trainer(run_dir=tmp_path, epochs=3)


def test_forged_counters_are_refused(tmp_path):
    trainer = stopped_after(2, tmp_path, epochs=3)
    trainer.progress.bad_steps = "many"
    trainer.save_checkpoint()
    with pytest.raises(FileFormatError, match="counters"):
        toy_trainer(run_dir=tmp_path, epochs=3)


def test_newest_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    trainer = toy_trainer(valid=[9], epochs=3, valid_every=1, run_dir=tmp_path, checkpoint_every=1)
    monkeypatch.setattr(reporting, "mean_measures", lambda *a, **k: (next(losses), {}))
    list(trainer)
    steps = [int(folder.name[-6:]) for folder in list_checkpoints(tmp_path)]
    assert steps == [6, 5, 2]
    assert (trainer.progress.best_step, trainer.progress.best_loss) == (2, 1.0)


TRAIN = """
    import workbench  # before mlx: it brings a fast BLAS
    from tests.toy_training import toy_trainer
    trainer = toy_trainer(run_dir={folder!r}, steps=5000, checkpoint_every=50)
    print("ready", flush=True)
    for report in trainer:
        {inside}
    print("done", trainer.stop_reason, flush=True)
"""


def start_training(folder, inside="pass"):
    process = start(TRAIN.format(folder=str(folder), inside=inside))
    assert process.stdout.readline().strip() == "ready", process.stderr.read()
    return process


def wait_for_steps(folder, steps, process):
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.stderr.read()


def test_a_second_process_is_refused_while_the_first_writes(tmp_path):
    process = start_training(tmp_path)
    try:
        with pytest.raises(RunError, match="being written by another process"):
            toy_trainer(run_dir=tmp_path, steps=5000)
    finally:
        process.kill()
        finish(process)
    resumed = toy_trainer(run_dir=tmp_path, steps=5000)  # a crash leaves no lock
    assert not resumed.finished


@pytest.mark.fault("interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_every_step_in_a_checkpoint(number, tmp_path):
    process = start_training(tmp_path)
    wait_for_steps(tmp_path, 20, process)
    process.send_signal(number)
    finished = finish(process)
    assert finished.code in (-signal.SIGINT, 128 + signal.SIGTERM), finished
    assert "done" not in finished.out
    steps = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
    assert read_checkpoint(list_checkpoints(tmp_path)[0]).step == steps
    assert toy_trainer(run_dir=tmp_path, steps=5000).steps_done == steps


@pytest.mark.fault("interrupts")
def test_a_loop_that_is_left_early_leaves_a_checkpoint(tmp_path):
    for report in toy_trainer(run_dir=tmp_path, epochs=3):
        if report.step == 2:
            break
    assert read_checkpoint(list_checkpoints(tmp_path)[0]).step == 2


def fail_after(steps, trainer):
    for report in trainer:
        if report.step == steps:
            raise RuntimeError("mine")


@pytest.mark.fault("interrupts")
def test_an_error_between_two_steps_leaves_a_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="mine"):
        fail_after(2, toy_trainer(run_dir=tmp_path, epochs=3))
    assert read_checkpoint(list_checkpoints(tmp_path)[0]).step == 2


def test_a_trainer_that_is_gone_lets_go_of_its_folder(tmp_path):
    trainer = toy_trainer(run_dir=tmp_path, epochs=3)
    assert lock.owner_of(tmp_path) is trainer.run
    del trainer
    assert lock.owner_of(tmp_path) is None


def test_a_folder_that_was_deleted_can_be_used_again(tmp_path):
    first = toy_trainer(run_dir=tmp_path / "run", epochs=3)
    first.step()
    shutil.rmtree(tmp_path / "run")
    second = toy_trainer(run_dir=tmp_path / "run", epochs=3)
    assert second.steps_done == 0
    assert lock.owner_of(tmp_path / "run") is second.run


@pytest.mark.fault("interrupts")
def test_an_interrupted_loss_leaves_no_half_update(tmp_path):
    def interrupt_twice(loss):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return loss

    trainer = toy_trainer(run_dir=tmp_path, epochs=3)
    trainer.step()
    before = state_of(trainer)
    trainer.loss_fn = FailAt(1, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    assert state_of(trainer) == before
    assert trainer.steps_done == 1
    trainer.step()


def test_a_folder_that_was_copied_goes_on_by_itself(tmp_path):
    stopped_after(2, tmp_path / "a", epochs=3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    ours, theirs = (toy_trainer(run_dir=tmp_path / name, epochs=3) for name in "ab")
    list(ours)
    list(theirs)
    assert_same_run(ours, theirs)
    assert mx.isfinite(mx.array(ours.reports[-1].loss))
