"""Training on streams: exact resume in mid-file, and everything else as with rows in memory."""

from __future__ import annotations

import functools
import json
import math
import os
import signal

import mlx.core as mx
import numpy as np
import pytest

from tests.faults.processes import error_of, forked, result_of
from tests.toy import save_toy_folder, toy_tokenizer
from tests.toy_streams import lines_of, numbered, numbers, toy_stream, write_files
from tests.toy_training import FailAt, computed, fail, interrupt, state_of, toy_trainer
from workbench.data.batches import collate
from workbench.data.datasets import load_dataset
from workbench.data.streams import stream_dataset
from workbench.errors import ConfigError, DataError, FallbackWarning, NotFiniteError, RunError
from workbench.models.loading import load_model
from workbench.runs.store import read_metrics
from workbench.tuning import profiling
from workbench.tuning.config import TrainConfig
from workbench.tuning.dpo import DPOConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import mean_loss, supervised_loss
from workbench.tuning.trainer import Trainer

COUNTS = (9, 14, 7)


def stream_trainer(folder, stream=None, **settings):
    """A toy trainer on a stream over a folder; 4 rows a step, 8 steps a pass."""
    data = toy_stream(folder, **{"buffer_rows": 7, **(stream or {})})
    return toy_trainer(data=data, **{"steps": 14, **settings})


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "data", "mixed", COUNTS)


def assert_same_run(ours, theirs):
    assert list(map(computed, ours.reports)) == list(map(computed, theirs.reports))
    assert state_of(ours) == state_of(theirs)


def test_a_pass_trains_every_target_once(folder):
    trainer = stream_trainer(folder)
    reports = list(trainer)
    assert [report.epoch for report in reports] == [1] * 8 + [2] * 6
    rows = [row for start in (0, 9, 23) for row in numbered(COUNTS[(0, 9, 23).index(start)], start)]
    data = load_dataset(rows, toy_tokenizer(), valid_fraction=0)
    targets = sum(example.num_targets for example in data.train)
    assert sum(report.num_tokens for report in reports[:8]) == targets
    shares = [report.epoch_share for report in reports]
    assert shares[7] == 1
    assert 0 < shares[8] < shares[13] < 1
    assert all(0 < share <= 1 for share in shares)


def test_the_first_loss_is_that_of_the_rows(tmp_path):
    rows = numbered(8)
    (tmp_path / "rows.jsonl").write_bytes(lines_of(rows))
    trainer = stream_trainer(tmp_path, micro_batch_size=8, steps=1)
    data = load_dataset(rows, toy_tokenizer(), valid_fraction=0)
    expected = mean_loss(trainer.model, data.train, 8)
    assert trainer.step().loss == pytest.approx(expected, abs=1e-6)


SETTINGS = {
    "mixed": {},
    "plain": {},
    "gzip": {"stream": {"buffer_rows": 3}},
    "mixed, accumulation, dropout": {"micro_batch_size": 2, "grad_accum_steps": 3, "dropout": 0.3},
    "gzip, all in the buffer": {"stream": {"buffer_rows": 500}},
    "plain, another seed": {"stream": {"seed": 5}},
    "mixed, one row a step": {"micro_batch_size": 1},
    "plain, validation": {"stream": {"valid": numbered(3, 70)}, "valid_every": 3},
    "gzip, full": {"full": True, "warmup_steps": 3},
}


@pytest.mark.fault("resume equality")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    form, settings = name.partition(",")[0], SETTINGS[name]
    folder = write_files(tmp_path / "data", form, COUNTS)
    whole = stream_trainer(folder, **settings)
    list(whole)
    for stop in (3, 8, 11):  # in the first file or the second, at the end of a pass, in the next
        left = stream_trainer(folder, run_dir=tmp_path / "run", **settings)
        for report in left:
            if report.step == stop:
                left.stop()
    resumed = stream_trainer(folder, run_dir=tmp_path / "run", **settings)
    assert resumed.steps_done == 11
    list(resumed)
    assert_same_run(resumed, whole)


def test_a_loop_that_is_left_and_entered_again_goes_on(folder):
    whole, left = stream_trainer(folder), stream_trainer(folder)
    list(whole)
    while not left.finished:
        next(iter(left))
    assert_same_run(left, whole)


def killed(folder, run_dir, step):
    """A training that dies while it computes a loss, some steps after its newest checkpoint."""
    trainer = stream_trainer(folder, run_dir=run_dir, checkpoint_every=4, dropout=0.2)
    for report in trainer:
        if report.step == step:
            trainer.loss_fn = lambda model, batch: os.kill(os.getpid(), signal.SIGKILL)


def to_the_end(folder, run_dir):
    """What the run ends with, from wherever it stands."""
    trainer = stream_trainer(folder, run_dir=run_dir, checkpoint_every=4, dropout=0.2)
    begun = trainer.steps_done
    list(trainer)
    weights, moments = state_of(trainer)
    return {
        "begun": begun,
        "reports": [repr(sorted(computed(report).items())) for report in trainer.reports],
        "weights": weights,
        "moments": {name: value.hex() for name, value in moments.items()},
    }


@pytest.mark.fault("SIGKILL, resumed")
def test_a_killed_run_goes_on_equal_to_the_bit(folder, tmp_path):
    assert forked(functools.partial(to_the_end, folder, None), tmp_path / "whole") == 0
    expected = result_of(tmp_path / "whole")
    for step in (3, 6):
        run_dir, results = tmp_path / f"run-{step}", tmp_path / f"{step}"
        assert forked(functools.partial(killed, folder, run_dir, step), results) == -9
        assert forked(functools.partial(to_the_end, folder, run_dir), results) == 0, error_of(
            results
        )
        found = result_of(results)
        assert found.pop("begun") == step // 4 * 4
        assert found == {name: value for name, value in expected.items() if name != "begun"}


def test_a_skipped_step_uses_its_rows_up(folder, tmp_path):
    places = []

    def loss_fn(model, batch):
        places.extend(batch.places)
        return supervised_loss(model, batch) * (math.nan if len(places) in (12, 20) else 1)

    settings = {"loss_fn": loss_fn, "on_bad_step": "skip", "steps": 8}
    trainer = stream_trainer(folder, run_dir=tmp_path / "run", checkpoint_every=1, **settings)
    for _ in range(4):
        trainer.step()
    again = stream_trainer(folder, run_dir=tmp_path / "run", **settings)
    list(again)
    assert again.progress.bad_steps == 2
    assert [report.skipped for report in again.reports] == [step in (2, 4) for step in range(8)]
    assert len(places) == len(set(places)) == sum(COUNTS)


def test_a_step_that_fails_trains_the_same_rows_the_next_time(folder, tmp_path):
    whole = stream_trainer(folder, fused_loss=False)
    list(whole)
    loss_fn = FailAt(10, lambda loss: loss * math.nan)
    settings = {"fused_loss": False, "loss_fn": loss_fn, "run_dir": tmp_path / "run"}
    trainer = stream_trainer(folder, **settings)
    with pytest.raises(NotFiniteError, match=r"step 10 gave loss .*part-\d\.jsonl(\.gz)?:\d+"):
        list(trainer)
    trainer.step()  # not saved
    resumed = stream_trainer(folder, **settings)  # from the checkpoint that the failure left
    assert resumed.steps_done == 9
    list(resumed)
    assert_same_run(resumed, whole)
    assert computed(trainer.reports[-1]) == computed(whole.reports[9])


@pytest.mark.parametrize("action", [interrupt, fail])
def test_an_interrupt_or_an_error_keeps_the_place(action, folder):
    whole = stream_trainer(folder, fused_loss=False)
    list(whole)
    trainer = stream_trainer(folder, fused_loss=False, loss_fn=FailAt(5, action))
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        list(trainer)
    list(trainer)
    assert_same_run(trainer, whole)


def test_a_reload_keeps_the_place(folder, tmp_path):
    model = save_toy_folder(tmp_path / "model")

    def trained(run_dir=None, **settings):
        base = load_model(model)
        add_lora(base.model, LoRAConfig(rank=4))
        config = TrainConfig(steps=10, micro_batch_size=4, learning_rate=1e-2, **settings)
        trainer = Trainer(base, toy_stream(folder), config, run_dir)
        list(trainer)
        return trainer

    whole, reloaded = trained(), trained(tmp_path / "run", reload_every=3)
    assert sum(report.released_bytes is not None for report in reloaded.reports) == 3
    assert state_of(reloaded) == state_of(whole)


CHANGES = {
    "stream.buffer_rows is 9, was 7": {"buffer_rows": 9},
    "stream.seed is 1, was 0": {"seed": 1},
    "stream.max_length is 20, was 2048": {"max_length": 20},
    "stream.train_on is 'all', was 'assistant'": {"train_on": "all"},
    "the validation data is another": {"valid": [{"text": "b"}]},
}


def test_another_stream_is_refused_and_told_apart(folder, tmp_path):
    left = stream_trainer(folder, run_dir=tmp_path / "run")
    left.step()
    left.save_checkpoint()
    for told, stream in CHANGES.items():
        with pytest.raises(RunError, match=told):
            stream_trainer(folder, stream, run_dir=tmp_path / "run")
    with pytest.raises(RunError, match="the training data is another"):
        toy_trainer(run_dir=tmp_path / "run", steps=14)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template += " "
    data = stream_dataset(folder, tokenizer, buffer_rows=7)
    with pytest.raises(RunError, match=r"stream\.tokenizer is"):
        toy_trainer(run_dir=tmp_path / "run", steps=14, data=data)
    resumed = stream_trainer(folder, {"max_bad_lines": 5}, run_dir=tmp_path / "run")
    assert resumed.steps_done == 1


def test_a_changed_file_is_named_before_anything_is_changed(folder, tmp_path):
    left = stream_trainer(folder, run_dir=tmp_path / "run")
    left.step()
    left.save_checkpoint()
    (folder / "part-1.jsonl").write_bytes(lines_of(numbered(14, 10)))
    metrics = read_metrics(tmp_path / "run")
    for allowed in (False, True):
        with pytest.raises(RunError, match=r"part-1\.jsonl: was changed since the run began"):
            stream_trainer(folder, run_dir=tmp_path / "run", allow_changes=allowed)
    assert read_metrics(tmp_path / "run").equals(metrics)


def test_a_run_may_go_on_with_a_stream_if_that_is_allowed(folder, tmp_path):
    first = toy_trainer(run_dir=tmp_path / "run", steps=14)
    first.step()
    first.save_checkpoint()
    trainer = stream_trainer(folder, run_dir=tmp_path / "run", allow_changes=True)
    list(trainer)
    assert [report.epoch for report in trainer.reports] == [1] * 9 + [2] * 5


def test_a_stream_needs_a_number_of_steps(folder):
    with pytest.raises(ConfigError, match=r"stream has no known number of rows.*steps=…"):
        stream_trainer(folder, steps=None, epochs=3)


def test_a_row_that_the_network_cannot_take_is_a_bad_line(tmp_path):
    rows = [*numbered(4), {"text": "x" * 600}, *numbered(3, 4)]
    (tmp_path / "rows.jsonl").write_bytes(lines_of(rows))
    trainer = stream_trainer(tmp_path, steps=2)
    list(trainer)
    (line,) = trainer.feed.bad_lines
    assert (line.line, line.reason) == (5, "has 601 tokens, the model has room for 512")
    with pytest.raises(DataError, match="more than 0 lines"):
        list(stream_trainer(tmp_path, {"max_bad_lines": 0}))


def test_what_is_kept_by_row_is_off_and_says_why(folder):
    trainer = stream_trainer(folder)
    assert not trainer.prefix.used
    assert "streamed" in str(trainer.prefix)
    assert trainer.prompt_sharing.used
    with pytest.warns(FallbackWarning, match="no prefix cache: the rows are streamed"):
        stream_trainer(folder, prefix_cache=True)


def test_preference_objectives_are_refused(folder):
    base = toy_trainer().base
    with pytest.raises(ConfigError, match="DPO needs preference pairs, data holds rows"):
        Trainer(base, toy_stream(folder), TrainConfig(steps=3), objective=DPOConfig())


def test_a_profile_takes_no_rows_away(folder, monkeypatch):
    monkeypatch.setattr(profiling, "measure_matmul", lambda: 100.0)
    whole, profiled = stream_trainer(folder), stream_trainer(folder)
    list(whole)
    for _ in range(6):
        profiled.step()
    profiling.profile_step(profiled, steps=4)
    list(profiled)
    assert_same_run(profiled, whole)


def test_the_checkpoint_holds_the_place_and_no_text(folder, tmp_path):
    trainer = stream_trainer(folder, run_dir=tmp_path / "run")
    trainer.step()
    state = json.loads((trainer.save_checkpoint() / "state.json").read_text())
    assert state["position"]["files"][0] == ["part-0.jsonl.gz", "part-1.jsonl", "part-2.jsonl.gz"]
    assert "xxx" not in json.dumps(state)


def test_rows_in_memory_are_collated_as_before():
    trainer = toy_trainer(micro_batch_size=3, grad_accum_steps=2)
    for step in range(2):
        rows = trainer.plan.micro_batches(step)
        for batch, numbered_rows in zip(trainer.feed.batches(step), rows, strict=True):
            expected = collate(trainer.data.train, numbered_rows)
            assert np.array_equal(batch.tokens, expected.tokens)
            assert batch.rows == expected.rows
            assert batch.places == tuple(trainer.data.train[row].where for row in numbered_rows)
    assert trainer.feed.state(1) is None
    assert trainer.step().epoch_share is None


def test_the_order_of_training_is_that_of_the_feed(folder):
    seen = []

    def loss_fn(model, batch):
        seen.append(batch)
        return supervised_loss(model, batch)

    trainer = stream_trainer(folder, loss_fn=loss_fn, steps=8)
    list(trainer)
    assert sorted(numbers([seen])) == list(range(sum(COUNTS)))
    assert mx.isfinite(trainer.model(mx.array([[3, 4]]))).all()
