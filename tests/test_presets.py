"""A preset plans before it loads, refuses what does not fit, and trains what it says."""

from __future__ import annotations

import dataclasses

import pytest
from mlx.utils import tree_flatten

import workbench as wb
from tests.toy import toy_base
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


def test_its_trainer_trains_its_adapter():
    short = dataclasses.replace(
        EARLIER,
        lora=LoRAConfig(rank=2, alpha=4, target_modules=("q_proj", "o_proj"), num_layers=1),
        train=dataclasses.replace(EARLIER.train, steps=2, warmup_steps=0),
    )
    base = toy_base()
    rows = [{"text": f"row {number} of the text that is trained"} for number in range(20)]
    trainer = short.trainer(wb.load_dataset(rows, base.tokenizer), base=base)
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
