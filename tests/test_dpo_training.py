"""The trainer on preference pairs: all that it does for other data, it does for these."""

import dataclasses
import json
import math
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.toy import save_toy_folder, toy_base, toy_dataset
from tests.toy_preferences import RAGGED, dpo_trainer, toy_preferences
from tests.toy_training import computed, state_of, trained
from workbench.data.batches import collate
from workbench.data.preferences import load_preferences
from workbench.errors import ConfigError, DataError, FallbackWarning, RunError, TrainingError
from workbench.live.chart import TrainingChart
from workbench.models.loading import load_model
from workbench.probes.parameters import changed, fingerprint
from workbench.runs.store import read_metrics
from workbench.tuning.config import StepReport, TrainConfig
from workbench.tuning.dpo import DPOConfig, DPOLoss
from workbench.tuning.lora import LoRAConfig, add_lora, remove_lora
from workbench.tuning.losses import mean_loss
from workbench.tuning.profiling import profile_step
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import accumulate

SETTINGS = {
    "as it comes": {},
    "dropout": {"lora": {"dropout": 0.3}},
    "dora": {"lora": {"use_dora": True}},
    "the last layer": {"lora": {"num_layers": 1}, "prefix_cache": True},
    "accumulation": {"micro_batch_size": 1, "grad_accum_steps": 3},
    "validation": {"valid": [(3, 4), (5, 2)], "valid_every": 1},
    "hinge": {"objective": DPOConfig(loss_type="hinge")},
    "grad checkpoint": {"grad_checkpoint": True},
}


def test_pairs_are_learnt_and_counted():
    trainer = dpo_trainer(epochs=8)
    first, *_, last = trainer
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert last.loss < 0.3
    assert last.extras["accuracy"] == 1
    assert last.extras["margin"] > 1
    assert last.extras["chosen_shift"] > 0 > last.extras["rejected_shift"]
    targets = sum(pair.num_targets for pair in trainer.data.train)
    assert sum(r.num_tokens for r in trainer.reports) == 8 * targets
    assert {r.epoch for r in trainer.reports} == set(range(1, 9))


def test_only_the_adapter_moves():
    trainer = dpo_trainer(epochs=3)
    before = fingerprint(trainer.model)
    list(trainer)
    moved = changed(before, fingerprint(trainer.model))
    assert moved == sorted(dict(tree_flatten(trainer.model.trainable_parameters())))
    assert all("lora_" in name for name in moved)
    remove_lora(trainer.model)
    assert fingerprint(trainer.model) == fingerprint(toy_base().model)


def test_micro_batches_make_the_update_of_one_batch():
    whole = dpo_trainer(epochs=4, micro_batch_size=6)
    parts = dpo_trainer(epochs=4, micro_batch_size=2, grad_accum_steps=3)
    assert len(list(whole)) == len(list(parts)) == 4
    for one, other in zip(whole.reports, parts.reports):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.extras["margin"] == pytest.approx(other.extras["margin"], rel=1e-3, abs=1e-4)
        assert one.num_tokens == other.num_tokens
    ours, theirs = trained(whole), trained(parts)
    assert all(np.allclose(ours[n], theirs[n], atol=2e-3) for n in ours)


def test_micro_batches_of_unequal_size_are_weighed_by_their_pairs():
    trainer = dpo_trainer(epochs=2)
    trainer.step()
    pairs, model = trainer.data.train, trainer.model
    found = []
    for cut in ([range(6)], [range(4), range(4, 6)], [[i] for i in range(6)]):
        batches, sums = [collate(pairs, rows) for rows in cut], {}
        loss, gradients = accumulate(model, trainer.loss_fn, batches, 0, sums=sums)
        assert sum(batch.weight for batch in batches) == 6
        found.append((loss, dict(tree_flatten(gradients)), sums))
    largest = max(mx.abs(g).max().item() for g in found[0][1].values())
    for loss, gradients, sums in found[1:]:
        assert loss.item() == pytest.approx(found[0][0].item(), rel=1e-5)
        assert sums["margin"].item() == pytest.approx(found[0][2]["margin"].item(), rel=1e-4)
        for name, gradient in gradients.items():
            assert mx.abs(gradient - found[0][1][name]).max().item() < 1e-4 * largest


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    settings = {"epochs": 3, **SETTINGS[name]}
    whole = dpo_trainer(**settings)
    list(whole)
    stopped = dpo_trainer(run_dir=tmp_path, **settings)
    for report in stopped:
        if report.step == 2:
            stopped.stop()
    del stopped
    resumed = dpo_trainer(run_dir=tmp_path, **settings)
    assert resumed.steps_done == 2
    list(resumed)
    assert list(map(computed, resumed.reports)) == list(map(computed, whole.reports))
    assert state_of(resumed) == state_of(whole)


def test_a_reloaded_run_equals_the_one_that_was_not(tmp_path):
    folder = save_toy_folder(tmp_path / "model")

    def trainer(run_dir=None, **settings):
        base = load_model(folder)
        add_lora(base.model, LoRAConfig(rank=4))
        config = TrainConfig(micro_batch_size=2, learning_rate=1e-2, epochs=2, **settings)
        return Trainer(base, toy_preferences(), config, run_dir, objective=DPOConfig())

    whole, reloaded = trainer(), trainer(tmp_path / "run", reload_every=2)
    list(whole)
    list(reloaded)
    assert [r.loss for r in reloaded.reports] == [r.loss for r in whole.reports]
    assert state_of(reloaded) == state_of(whole)


@pytest.mark.parametrize("form", ["shared_prompt", "prefix_cache"])
def test_faster_forms_change_no_loss(form):
    lora, valid = {"num_layers": 1}, [(3, 4), (5, 2)]
    runs = {}
    for used in (True, False):
        settings = {"shared_prompt": False, "prefix_cache": False, form: used}
        runs[used] = dpo_trainer(epochs=3, lora=lora, valid=valid, valid_every=1, **settings)
        list(runs[used])
    assert runs[True].prefix.used is (form == "prefix_cache")
    assert runs[True].prompt_sharing.used is (form == "shared_prompt")
    if form == "prefix_cache":  # a state of 32 float32 for each token that is read, of both sides
        data = runs[True].data
        read = sum(len(side) - 1 for pair in data.train + data.valid for side in pair.sides)
        assert runs[True].prefix.needed_bytes == read * 32 * 4
    for ours, theirs in zip(runs[True].reports, runs[False].reports):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-4)


def test_validation_is_the_mean_over_the_pairs():
    trainer = dpo_trainer(epochs=3, valid=RAGGED[:5], valid_every=3, micro_batch_size=2)
    list(trainer)
    last = trainer.reports[-1]
    reference = trainer.objective.references
    losses, margins = [], []
    for row in range(5):
        loss, measures = DPOLoss(DPOConfig(), reference)(
            trainer.model, collate(trainer.data.valid, [row])
        )
        losses.append(loss.item())
        margins.append(measures["margin"].item())
    assert last.valid_loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert last.extras["valid_accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert last.extras["valid_margin"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-4)
    assert trainer.validate() == last.valid_loss
    assert "valid_loss" not in trainer.reports[0].extras
    assert mean_loss(trainer.model, [], 2, trainer.loss_fn) is None


def test_what_is_measured_is_on_disk_and_comes_back(tmp_path):
    trainer = dpo_trainer(epochs=2, valid=[(3, 4)], run_dir=tmp_path)
    list(trainer)
    rows = read_metrics(tmp_path).to_dict("records")
    assert [row["extras"] for row in rows] == [report.extras for report in trainer.reports]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["objective"] == dataclasses.asdict(DPOConfig())
    assert "accuracy 1" in str(trainer.reports[-1])


@pytest.mark.parametrize("extras", [3, [1.0], {"margin": "x"}, {"margin": None}, {"a": {}}])
def test_measures_that_are_no_numbers_are_refused(extras):
    row = dataclasses.asdict(dpo_trainer().step())
    with pytest.raises(RunError, match="extras is"):
        StepReport.from_row({**row, "extras": extras})


def test_a_run_of_another_objective_is_another_run(tmp_path):
    next(iter(dpo_trainer(run_dir=tmp_path, epochs=2)))
    with pytest.raises(RunError, match=r"objective\.beta is 0\.2, was 0\.1"):
        dpo_trainer(run_dir=tmp_path, epochs=2, objective=DPOConfig(beta=0.2))
    pair = toy_preferences().train[0]
    swapped = dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    for other in (
        swapped,
        dataclasses.replace(pair, rejected=toy_preferences(seed=3).train[0].rejected),
    ):
        data = toy_preferences()
        data.train[0] = other
        with pytest.raises(RunError, match="the training data is another"):
            dpo_trainer(run_dir=tmp_path, epochs=2, data=data)


def test_a_bad_pair_is_skipped_or_named(tmp_path):
    trainer = dpo_trainer(epochs=1, run_dir=tmp_path, on_bad_step="skip")
    own = trainer.loss_fn
    trainer.loss_fn = lambda model, batch: (own(model, batch)[0] * math.nan, own(model, batch)[1])
    assert trainer.step().skipped
    trainer.loss_fn = own
    assert not trainer.step().skipped
    again = dpo_trainer(epochs=1, run_dir=tmp_path, on_bad_step="skip")
    assert [report.skipped for report in again.reports] == [True, False]
    named = dpo_trainer(epochs=1)
    named.loss_fn = lambda model, batch: own(model, batch)[0] * math.nan
    with pytest.raises(TrainingError, match="toy pair 3"):
        list(named)


def test_data_and_objective_must_fit():
    base, config = toy_base(), TrainConfig()
    add_lora(base.model)
    pairs, rows = toy_preferences(), toy_dataset([9, 9])
    with pytest.raises(ConfigError, match=r"preference pairs need an objective.*DPOConfig"):
        Trainer(base, pairs, config)
    with pytest.raises(ConfigError, match=r"DPO needs preference pairs, toy holds rows"):
        Trainer(base, rows, config, objective=DPOConfig())
    with pytest.raises(ConfigError, match="a loss_fn and an objective exclude each other"):
        Trainer(base, pairs, config, loss_fn=lambda m, b: 0, objective=DPOConfig())
    with pytest.raises(ConfigError, match="must be a DPOConfig or a ProvenanceConfig, got str"):
        Trainer(base, pairs, config, objective="dpo")
    with pytest.warns(FallbackWarning, match="no fused loss: DPO") as caught:
        Trainer(base, pairs, TrainConfig(fused_loss=True), objective=DPOConfig())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(base, pairs, config, objective=DPOConfig())


def test_both_sides_must_fit_the_network():
    data = toy_preferences()
    data.train[2].rejected.tokens[-1] = 259
    with pytest.raises(DataError, match="toy pair 2: token id 259"):
        dpo_trainer(data=data)
    with pytest.raises(DataError, match="toy pair 1: has 604 tokens"):
        dpo_trainer([(3, 4), (3, 600)])


def test_the_chart_and_the_profile_take_pairs():
    trainer = dpo_trainer(epochs=4, valid=[(3, 4)], valid_every=2)
    chart = TrainingChart()
    for report in trainer:
        chart.add(report)
    assert profile_step(dpo_trainer(epochs=4), steps=1).losses[0] > 0


def test_smollm2_learns_to_prefer_short_answers(smollm2):
    from workbench.data.capitals import all_capitals

    rows = [
        {
            "prompt": f"What is the capital of {capital.country}?",
            "chosen": f"{capital.capital}.",
            "rejected": f"The capital city of {capital.country} is called {capital.capital}.",
        }
        for capital in all_capitals()[:6]
    ]
    data = load_preferences(rows, smollm2.tokenizer, valid_fraction=0.34)
    before = fingerprint(smollm2.model)
    try:
        add_lora(smollm2.model, LoRAConfig(rank=4, num_layers=4))
        config = TrainConfig(steps=5, micro_batch_size=4, learning_rate=1e-3)
        trainer = Trainer(smollm2, data, config, objective=DPOConfig())
        first, *_, last = trainer
    finally:
        remove_lora(smollm2.model)
        smollm2.model.unfreeze()
    assert first.loss == pytest.approx(math.log(2), abs=1e-4)
    assert last.extras["margin"] > 0.3
    assert last.extras["valid_accuracy"] == 1
    assert fingerprint(smollm2.model) == before
