"""Interrupts and failures: weights, optimizer, reports and disk agree afterwards."""

import math
import signal

import pytest

from tests.toy import toy_dataset
from tests.toy_training import FailAt, computed, fail, interrupt, state_of, toy_trainer
from workbench.data.datasets import Dataset
from workbench.errors import DataError, TrainingError
from workbench.runs.store import read_metrics
from workbench.tuning.trainer import Trainer


@pytest.mark.parametrize("call", [2, 3, 4])  # first and second micro-batch of a step; validation
def test_an_interrupt_waits_until_step_disk_and_weights_agree(tmp_path, call):
    settings = {"dropout": 0.2, "epochs": 3, "micro_batch_size": 2, "grad_accum_steps": 2}
    settings["fused_loss"] = False  # the loss function that fails takes the other form
    whole = toy_trainer(valid=[9], **settings)
    list(whole)
    loss_fn = FailAt(call, interrupt)
    trainer = toy_trainer(valid=[9], **settings, run_dir=tmp_path / "run", loss_fn=loss_fn)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    assert signal.getsignal(signal.SIGINT) is handler
    done = (call + 1) // 2  # the step in which the signal came is complete
    assert trainer.steps_done == len(read_metrics(tmp_path / "run")) == done
    list(trainer)
    assert [computed(r) for r in trainer.reports] == [computed(r) for r in whole.reports]
    assert len(read_metrics(tmp_path / "run")) == whole.steps_done
    assert state_of(trainer) == state_of(whole)


def test_a_step_without_targets_is_refused_with_its_rows_and_changes_nothing():
    data = toy_dataset([5, 7, 9], seed=3)
    for row in data.train[:2]:
        row.loss_mask[1:] = False  # the first token is never a target
    trainer = toy_trainer(data=data, micro_batch_size=1, steps=3)
    before = state_of(trainer)
    with pytest.raises(DataError, match=r"^toy row [01]: step \d has no supervised target"):
        list(trainer)
    assert trainer.steps_done < 3
    assert trainer.steps_done or state_of(trainer) == before
    together = toy_trainer(data=data, micro_batch_size=3, steps=1)
    assert [report.num_tokens for report in together] == [7]


def test_an_interrupt_cuts_a_validation_short_but_not_the_step():
    # Two micro-batches train; the third call is the first of three that validate.
    loss_fn = FailAt(3, interrupt)
    trainer = toy_trainer(valid=[9] * 12, steps=2, valid_every=1, micro_batch_size=4,
                          grad_accum_steps=2, loss_fn=loss_fn)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    assert trainer.steps_done == 1
    assert trainer.reports[0].valid_loss is None
    assert loss_fn.calls == 3
    assert trainer.step().valid_loss is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(value, call):
    loss_fn = FailAt(call, lambda loss: loss * value)
    trainer = toy_trainer(epochs=2, micro_batch_size=4, grad_accum_steps=2, loss_fn=loss_fn)
    while loss_fn.calls + 2 < call:
        trainer.step()
    before, done = state_of(trainer), trainer.steps_done
    with pytest.raises(TrainingError) as caught:
        trainer.step()
    assert all(f"toy row {row}" in str(caught.value) for row in range(8))
    assert "model.layers.0.self_attn.q_proj.lora_a" in str(caught.value)
    assert state_of(trainer) == before
    assert trainer.steps_done == done
    assert trainer.step().step == done + 1


def test_a_loss_function_that_raises_leaves_everything_as_it_was():
    trainer = toy_trainer(epochs=2, loss_fn=FailAt(2, fail))
    trainer.step()
    before = state_of(trainer)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.step()
    assert state_of(trainer) == before
    assert not trainer.model.training
    assert [report.step for report in trainer] == [2, 3, 4]


def test_a_step_is_on_record_although_its_validation_failed(tmp_path):
    loss_fn = FailAt(2, fail)
    trainer = toy_trainer(valid=[9], steps=2, valid_every=1, loss_fn=loss_fn, run_dir=tmp_path)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.step()
    assert trainer.steps_done == len(read_metrics(tmp_path)) == 1
    assert trainer.step().step == 2


def test_a_validation_loss_that_is_not_a_number_is_on_record(tmp_path):
    loss_fn = FailAt(2, lambda loss: loss * math.nan)
    trainer = toy_trainer(valid=[9], steps=1, loss_fn=loss_fn, run_dir=tmp_path / "run")
    assert math.isnan(trainer.step().valid_loss)
    assert math.isnan(read_metrics(tmp_path / "run").valid_loss[0])


class Broken:
    """Stands between a trainer and its optimizer, and spoils an update half-way."""

    def __init__(self, optimizer, spoil):
        self.__dict__.update(optimizer=optimizer, spoil=spoil)

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def __setattr__(self, name, value):
        setattr(self.optimizer, name, value)

    def update(self, model, gradients):
        self.optimizer.update(model, gradients)
        self.spoil(model)


def planted_error(model):
    raise RuntimeError("planted")


def planted_nan(model):
    model.layers[0].mlp.up_proj.lora_b += math.nan


@pytest.mark.parametrize(
    ("spoil", "message"), [(planted_error, "planted"), (planted_nan, r"0\.mlp\.up_proj\.lora_b")]
)
def test_an_optimizer_failure_raises_and_restores(spoil, message):
    whole, trainer = toy_trainer(epochs=2), toy_trainer(epochs=2)
    list(whole)
    trainer.step()
    before, optimizer = state_of(trainer), trainer.optimizer
    trainer.optimizer = Broken(optimizer, spoil)
    with pytest.raises(TrainingError, match=f"failed at step 2.*{message}"):
        trainer.step()
    trainer.optimizer = optimizer
    assert state_of(trainer) == before
    assert trainer.steps_done == 1
    list(trainer)
    assert state_of(trainer) == state_of(whole)


def test_nothing_trainable_raises(base, tmp_path):
    base.model.freeze()
    with pytest.raises(TrainingError, match=r"nothing is trainable.*add_lora"):
        Trainer(base, toy_dataset([9]), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("token", [-1, 259, 1_000_000])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_token_ids_outside_the_vocabulary_raise(token, split):
    data = toy_dataset([9, 9], valid=[9])
    getattr(data, split)[0].tokens[4] = token
    with pytest.raises(DataError, match=f"toy row 0: token id {token} is outside .* 259"):
        toy_trainer(data=data)


def test_rows_longer_than_the_models_positions_raise():
    with pytest.raises(DataError, match=r"toy row 1: has 514 tokens.*max_length=512"):
        toy_trainer([9, 514])
    assert toy_trainer([513], steps=1).step().num_input_tokens == 512


def test_no_rows_raise():
    with pytest.raises(DataError, match="no training rows"):
        toy_trainer(data=Dataset("nothing", []))
