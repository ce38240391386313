"""Observers of a training: told of every step, mlx-lm's dictionaries, failures that cost no run."""

import dataclasses
import json
import re
import sys

import mlx.optimizers as optim
import pytest
from mlx_lm.tuner import trainer as mlx_lm_trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset

from tests.toy import toy_dataset, toy_model
from tests.toy_training import RAGGED, computed, toy_trainer
from workbench.errors import ConfigError, ObserverWarning
from workbench.tuning.exporters import scalars, to_tensorboard, to_trackio
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.observers import Observers
from workbench.tuning.trainer import Trainer


class Kept(TrainingCallback):
    """Keeps what it is told, as W&B's and SwanLab's would send it on."""

    def __init__(self):
        self.train, self.valid = [], []

    def on_train_loss_report(self, train_info):
        self.train.append(train_info)

    def on_val_loss_report(self, val_info):
        self.valid.append(val_info)


def observed(*observers, **settings):
    """A toy trainer with observers."""
    trainer = toy_trainer(steps=4, **settings)
    for observer in observers:
        trainer.observers.add(observer)
    return trainer


def test_a_function_is_told_of_every_report_once_in_order():
    told = []
    trainer = observed(told.append, valid=[9], valid_every=2)
    reports = list(trainer)
    assert told == reports == trainer.reports
    assert [report.valid_seconds is not None for report in told] == [False, True, False, True]
    assert told[1].valid_seconds > 0


def test_observers_change_no_number():
    plain = [computed(report) for report in toy_trainer(steps=4)]
    assert [computed(report) for report in observed(Kept(), print_nothing)] == plain


def print_nothing(report):
    """An observer that does nothing."""


class Told:
    """A callback by its methods alone, of no class of mlx-lm's."""

    def __init__(self):
        self.losses = []

    def on_train_loss_report(self, info):
        self.losses.append(info["train_loss"])

    def on_val_loss_report(self, info):
        self.losses.append(info["val_loss"])


def mlx_lms_own_dictionaries(folder):
    """What mlx-lm itself tells a callback."""
    kept, model, data = (
        Kept(),
        toy_model(),
        [(list(e.tokens), 0) for e in toy_dataset([9, 9]).train],
    )
    add_lora(model, LoRAConfig(rank=2))
    kinds = CacheDataset(_Processed(data))
    arguments = mlx_lm_trainer.TrainingArgs(batch_size=1, iters=2, steps_per_report=1)
    arguments.adapter_file = folder / "adapters.safetensors"
    mlx_lm_trainer.train(model, optim.SGD(0.1), kinds, kinds, arguments, training_callback=kept)
    return kept


class _Processed(list):
    def process(self, row):
        return row


def test_a_callback_gets_the_keys_and_types_that_mlx_lm_gives(tmp_path):
    theirs, ours = mlx_lms_own_dictionaries(tmp_path), Kept()
    list(observed(ours, valid=[9]))
    for kind in ("train", "valid"):
        mine, other = getattr(ours, kind)[-1], getattr(theirs, kind)[-1]
        assert {n: type(v) for n, v in mine.items()} == {n: type(v) for n, v in other.items()}


def test_a_callback_counts_micro_batches_and_targets():
    kept, seen = Kept(), Told()
    trainer = observed(kept, seen, valid=[9], valid_every=4, grad_accum_steps=2, micro_batch_size=2)
    reports = list(trainer)
    assert [info["iteration"] for info in kept.train] == [2, 4, 6, 8]
    assert [info["train_loss"] for info in kept.train] == [report.loss for report in reports]
    tokens = [report.num_tokens for report in reports]
    assert [info["trained_tokens"] for info in kept.train] == [sum(tokens[:n]) for n in range(1, 5)]
    last, report = kept.train[-1], reports[-1]
    assert last["iterations_per_second"] == pytest.approx(2 / report.step_seconds)
    assert last["tokens_per_second"] == pytest.approx(report.num_tokens / report.step_seconds)
    assert last["peak_memory"] == report.peak_bytes / 1e9
    assert kept.valid == [
        {"iteration": 8, "val_loss": report.valid_loss, "val_time": report.valid_seconds}
    ]
    assert len(seen.losses) == 5


def test_after_a_resume_the_targets_of_before_are_counted(tmp_path):
    whole, kept = Kept(), Kept()
    list(observed(whole))
    first = toy_trainer(steps=4, run_dir=tmp_path)
    for _ in range(2):
        first.step()
    first.save_checkpoint()
    second = toy_trainer(steps=4, run_dir=tmp_path)
    second.observers.add(kept)
    list(second)
    expected = [info["trained_tokens"] for info in whole.train[2:]]
    assert [info["trained_tokens"] for info in kept.train] == expected


class Breaks:
    """Fails at its second step."""

    def __init__(self, error):
        self.error, self.told = error, 0

    def __call__(self, report):
        self.told += 1
        if self.told == 2:
            raise self.error


def test_an_observer_that_fails_is_named_and_dropped_and_the_run_goes_on(tmp_path):
    broken, told = Breaks(RuntimeError("no network")), []
    trainer = observed(broken, told.append, run_dir=tmp_path)
    message = r"the observer Breaks failed at step 2 and is told no more: RuntimeError: no network"
    with pytest.warns(ObserverWarning, match=message) as caught:
        reports = list(trainer)
    assert len(caught) == 1
    assert (broken.told, len(told), len(reports), len(trainer.observers)) == (2, 4, 4, 1)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]


def test_an_observer_may_stop_the_run_and_the_checkpoint_is_there(tmp_path):
    trainer = toy_trainer(steps=4, run_dir=tmp_path)
    trainer.observers.add(lambda report: trainer.stop("loss is low") if report.step == 2 else None)
    assert len(list(trainer)) == 2
    assert (tmp_path / "checkpoints" / "step-000002").exists()


def test_an_interrupt_from_an_observer_leaves_a_whole_step_and_its_checkpoint(tmp_path):
    trainer = observed(Breaks(KeyboardInterrupt()), run_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    assert trainer.steps_done == 2
    assert (tmp_path / "checkpoints" / "step-000002").exists()
    assert len(list(trainer)) == 2


@pytest.mark.parametrize("members", [3, None, [3], ["print"]])
def test_what_observes_nothing_is_refused_by_name(members):
    with pytest.raises(ConfigError, match="must be a function of a StepReport, got"):
        Observers(members)


def test_observers_are_added_and_removed_and_must_be_functions():
    told, observers = [], Observers()
    observers.add(told.append)
    assert len(observers) == 1
    observers.remove(print_nothing)
    with pytest.raises(ConfigError, match="must be a function of a StepReport, got str"):
        observers.add("wandb")
    with pytest.raises(ConfigError, match="got list"):
        Observers([[]])


def test_the_trainer_takes_them_when_it_is_made():
    told, plain = [], toy_trainer(steps=2)
    assert list(Trainer(plain.base, plain.data, plain.config, observers=[told.append])) == told


def test_one_observer_alone_needs_no_list():
    assert len(Observers(print_nothing)) == len(Observers(TrainingCallback())) == 1


def test_scalars_are_the_numbers_of_a_report():
    report = toy_trainer(RAGGED).step()
    found = scalars(report)
    assert found["loss"] == report.loss
    assert found["skipped"] == 0.0
    assert not {"step", "total_steps", "valid_loss"} & found.keys()
    assert all(type(value) is float for value in found.values())
    more = scalars(dataclasses.replace(report, extras={"margin": 0.5}))
    assert more == {**found, "margin": 0.5}


@pytest.mark.parametrize(
    ("make", "extra"),
    [(lambda: to_tensorboard("x"), "tensorboard"), (lambda: to_trackio("x"), "trackio")],
)
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, make, extra):
    for name in [name for name in sys.modules if name.split(".")[0] == extra]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, extra, None)  # as Python does for what must not be found
    with pytest.raises(ConfigError, match=rf"{extra} is not installed.*\[{extra}\]"):
        make()


def test_tensorboards_own_reader_finds_every_step(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -e .[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    trainer = observed(to_tensorboard(tmp_path / "events"), valid=[9], valid_every=2)
    reports = list(trainer)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    read = {
        tag: [
            (event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)
        ]
        for tag in ("loss", "valid_loss", "learning_rate", "process_bytes")
    }
    for tag, pairs in read.items():
        expected = [(r.step, getattr(r, tag)) for r in reports if getattr(r, tag) is not None]
        assert [step for step, _ in pairs] == [step for step, _ in expected]
        assert [v for _, v in pairs] == pytest.approx([v for _, v in expected], rel=1e-6), tag


def test_tensorboards_folder_that_is_a_file_is_named(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -e .[tensorboard]")
    (tmp_path / "events").write_text("")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'events'}: cannot be written")):
        to_tensorboard(tmp_path / "events")


def test_trackio_keeps_every_step_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio", reason="pip install -e .[trackio]")
    trainer = observed(to_trackio("toy", "one", {"rank": 4}), valid=[9])
    reports = list(trainer)
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("toy", "one")
    assert [(row["step"], row["loss"]) for row in rows] == [(r.step, r.loss) for r in reports]
    assert rows[-1]["valid_loss"] == reports[-1].valid_loss
