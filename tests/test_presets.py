"""A preset plans before it loads, refuses what does not fit, and trains what it says."""

from __future__ import annotations

import dataclasses

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import workbench as wb
from tests.toy import TOY_CONFIG, save_toy_folder, toy_base
from workbench.errors import ConfigError, MemoryWarning, WorkbenchError
from workbench.tuning.lora import LoRAConfig
from workbench.tuning.presets import PRESETS, preset

GB = 10**9
EARLIER = preset("llama-3.1-8b-rank2")


def test_the_earlier_run_has_its_settings():
    train, lora = EARLIER.train, EARLIER.lora
    assert (train.steps, train.micro_batch_size, train.grad_accum_steps) == (50, 2, 8)
    assert (train.learning_rate, train.warmup_steps, train.max_grad_norm) == (5e-5, 100, 1.0)
    assert (train.weight_decay, train.adam_betas, train.adam_epsilon) == (0.01, (0.9, 0.999), 1e-8)
    assert (lora.rank, lora.scale, lora.num_layers, EARLIER.max_length) == (2, 2.0, 16, 512)
    assert set(lora.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_it_fits_the_machine_that_it_was_made_for_and_no_small_one():
    large = EARLIER.plan(wb.Machine("a Mac with 192 GB", 192 * GB, gpu=True))
    small = EARLIER.plan(wb.Machine("a Mac with 16 GB", 16 * GB, gpu=True))
    assert large.fits
    assert not small.fits
    assert 16 * GB < large.peak_bytes < 36.7 * GB  # 8 billion numbers of 16 bits; its start


def test_the_plan_is_of_the_presets_optimizer():
    machine = wb.Machine("a Mac with 192 GB", 192 * GB, gpu=True)
    train = dataclasses.replace(EARLIER.train, optimizer="lion")
    lion = dataclasses.replace(EARLIER, train=train).plan(machine)
    assert 2 * lion.parts["optimizer"] == EARLIER.plan(machine).parts["optimizer"]


def test_what_does_not_fit_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    huge = dataclasses.replace(
        EARLIER, dimensions={**EARLIER.dimensions, "num_hidden_layers": 1000}
    )
    with pytest.raises(ConfigError, match=r"rank2: .*does NOT fit"):
        huge.trainer()
    # Forced, it goes on to the model, which this test has not got.
    with pytest.warns(MemoryWarning, match="NOT fit"), pytest.raises(WorkbenchError):
        dataclasses.replace(huge, model="no/such-model").trainer(force=True)


def test_four_bits_are_planned_and_advised_where_they_fit(monkeypatch):
    box = wb.Machine("a Linux box", 24 * GB, available_bytes=20 * GB)
    monkeypatch.setattr(wb.Machine, "here", classmethod(lambda cls: box))
    plain, packed = EARLIER.plan(), EARLIER.plan(quantise={"bits": 4})
    assert not plain.fits
    assert packed.roomy
    assert [advice.settings for advice in plain.advice] == [{"bits": 4}]
    assert plain.advice[0].plan.process_bytes == packed.process_bytes
    with pytest.raises(ConfigError, match=r'quantise=\{"bits": 4\}: .* GB, margin') as caught:
        EARLIER.trainer()
    assert "bits=4" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"quantise: .*got 64, 5\.5"):
        EARLIER.plan(quantise={"bits": 5.5})


TINY = dataclasses.replace(
    EARLIER,
    lora=LoRAConfig(rank=2, alpha=4, target_modules=("q_proj", "o_proj"), num_layers=1),
    train=dataclasses.replace(EARLIER.train, steps=2, warmup_steps=0),
    max_length=24,
)
ROWS = [{"text": f"row {number} of the text that is trained"} for number in range(20)]


def test_a_preset_loads_its_model_quantised_and_keeps_so_many_tokens_of_a_row(tmp_path):
    folder = save_toy_folder(tmp_path / "toy")
    tiny = dataclasses.replace(TINY, model=str(folder), dimensions=TOY_CONFIG)
    seen = []
    told = [{"authority_weight": n % 7 / 10, "provenance_entropy": 1.0} for n in range(len(ROWS))]
    trainer = tiny.trainer(
        [row | own for row, own in zip(ROWS, told, strict=True)],
        quantise={"bits": 4, "group_size": 32},
        objective=wb.ProvenanceConfig("weighted"),
        observers=seen.append,
    )
    assert {len(row) for row in trainer.data.train} == {24}
    assert isinstance(trainer.model.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert list(trainer) == seen
    assert trainer.objective.config.kind == "weighted"


def test_arguments_that_no_trainer_takes_are_refused_before_anything_is_loaded():
    lost = dataclasses.replace(TINY, model="no/such-model", dimensions=TOY_CONFIG)
    with pytest.raises(TypeError, match="unexpected keyword argument 'objektive'"):
        lost.trainer(ROWS, objektive=None)
    with pytest.raises(ConfigError, match="a base is given"):
        lost.trainer(ROWS, base=toy_base(), quantise={"bits": 4})


def test_its_trainer_trains_its_adapter():
    base = toy_base()
    trainer = TINY.trainer(wb.load_dataset(ROWS, base.tokenizer), base=base)
    names = [name for name, _ in tree_flatten(base.model.trainable_parameters())]
    assert len(names) == 4
    before = wb.fingerprint(base.model)
    assert [report.step for report in trainer] == [1, 2]
    assert set(wb.changed(before, wb.fingerprint(base.model))) == set(names)


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ConfigError, match=r"llama-3\.1-8b-rank2"):
        preset("llama-9000b")
    with pytest.raises(ConfigError, match=r"unknown preset \['llama'\]"):
        preset(["llama"])
    assert all(name == each.name for name, each in PRESETS.items())
