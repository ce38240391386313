"""The step and the loop, on a toy model: what it computes, and what it leaves behind."""

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.toy_training import RAGGED, FailAt, computed, fail, state_of, toy_trainer, trained
from workbench.data.batches import collate
from workbench.errors import TrainingError
from workbench.runs.store import read_metrics
from workbench.tuning.losses import mean_loss, plain_loss, supervised_loss
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import accumulate


def test_one_batch_is_learnt_by_heart():
    trainer = toy_trainer([12] * 2, full=True, steps=80)
    losses = [report.loss for report in trainer]
    assert losses[0] > 3
    assert losses[-1] < 0.05


def test_every_row_is_trained_once_an_epoch_and_counted():
    trainer = toy_trainer(epochs=2, micro_batch_size=3)
    reports = list(trainer)
    assert [report.epoch for report in reports] == [1, 1, 1, 2, 2, 2]
    targets = sum(example.num_targets for example in trainer.data.train)
    assert sum(report.num_tokens for report in reports) == 2 * targets
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert all(report.total_steps == 6 for report in reports)


def test_fewer_rows_than_the_batch_train():
    (report,) = toy_trainer([9], micro_batch_size=8)
    assert report.num_tokens == 7
    assert report.num_input_tokens == 8


def test_the_loss_of_a_step_is_the_mean_over_its_targets():
    trainer = toy_trainer(micro_batch_size=2, grad_accum_steps=4)
    expected = mean_loss(trainer.model, trainer.data.train, 1)
    assert trainer.step().loss == pytest.approx(expected, rel=1e-5)


def textbook_adamw(weights, gradients, moments, t, rate, decay, betas, epsilon):
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    for name, g in gradients.items():
        m, v = moments.get(name, (0.0, 0.0))
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        moments[name] = m, v
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        weights[name] -= rate * (m_hat / (np.sqrt(v_hat) + epsilon) + decay * weights[name])


@pytest.mark.parametrize("full", [False, True])
def test_three_steps_equal_the_textbooks_adamw(full):
    trainer = toy_trainer(
        [12] * 4, full=full, steps=3, schedule="linear", weight_decay=0.1, max_grad_norm=0.5,
        adam_betas=(0.8, 0.9),
    )  # fmt: skip
    twin, moments = toy_trainer([12] * 4, full=full), {}
    weights = {name: w.astype(np.float64) for name, w in trained(twin).items()}
    for t in (1, 2, 3):
        new = [(name, mx.array(w.astype(np.float32))) for name, w in weights.items()]
        twin.model.update(tree_unflatten(new))
        batch = collate(trainer.data.train, trainer.plan.micro_batches(t - 1)[0])
        _, tree = nn.value_and_grad(twin.model, plain_loss)(twin.model, batch)
        gradients = {n: np.array(g, np.float64) / batch.num_tokens for n, g in tree_flatten(tree)}
        norm = math.sqrt(sum((g * g).sum() for g in gradients.values()))
        gradients = {n: g * min(1, 0.5 / norm) for n, g in gradients.items()}
        rate = 1e-2 * (4 - t) / 3
        textbook_adamw(weights, gradients, moments, t, rate, 0.1, (0.8, 0.9), 1e-8)
        report = trainer.step()
        assert report.grad_norm == pytest.approx(norm, rel=1e-3)
        assert report.learning_rate == pytest.approx(rate)
    for name, array in trained(trainer).items():
        # A gradient near zero has a sign that rounding decides.
        differs = np.abs(array - weights[name]) > 1e-4
        assert differs.mean() <= 0.002, name


def test_accumulated_micro_batches_equal_one_large_batch():
    many = toy_trainer(steps=1, micro_batch_size=1, grad_accum_steps=8, max_grad_norm=0)
    one = toy_trainer(steps=1, micro_batch_size=8, max_grad_norm=0)
    sums = []
    for trainer in (many, one):
        batches = [collate(trainer.data.train, rows) for rows in trainer.plan.micro_batches(0)]
        sums.append(accumulate(trainer.model, trainer.loss_fn, batches, seed=0))
    assert len(many.plan.micro_batches(0)) == 8
    assert sums[0][0].item() == pytest.approx(sums[1][0].item(), rel=1e-5)
    gradients = [dict(tree_flatten(tree)) for _, tree in sums]
    for name, gradient in gradients[1].items():
        scale = max(1.0, mx.abs(gradient).max().item())
        assert mx.abs(gradients[0][name] - gradient).max().item() <= 1e-5 * scale, name
    reports = many.step(), one.step()
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-5)


def test_a_mean_of_micro_batch_means_would_differ():
    trainer = toy_trainer(micro_batch_size=1, grad_accum_steps=8)
    rows = [collate(trainer.data.train, [row]) for row in range(len(RAGGED))]
    means = [supervised_loss(trainer.model, batch).item() / batch.num_tokens for batch in rows]
    assert abs(trainer.step().loss - sum(means) / len(means)) > 1e-2


def test_the_norm_is_reported_before_and_after_clipping():
    free, clipped = toy_trainer(max_grad_norm=0).step(), toy_trainer(max_grad_norm=0.25).step()
    assert free.grad_norm == free.clipped_grad_norm > 0.25
    assert clipped.grad_norm == free.grad_norm
    assert clipped.clipped_grad_norm == 0.25


def test_metrics_on_disk_equal_the_reports(tmp_path):
    trainer = toy_trainer(valid=[9, 11], epochs=3, valid_every=2, run_dir=tmp_path / "run")
    reports = []
    for report in trainer:
        reports.append(report)
        assert len(read_metrics(tmp_path / "run")) == trainer.steps_done == report.step
    assert trainer.reports == reports
    on_disk = read_metrics(tmp_path / "run").astype(object).where(lambda table: table.notna(), None)
    assert on_disk.to_dict("records") == [dataclasses.asdict(report) for report in reports]
    assert [r.valid_loss is not None for r in reports] == [False, True, False, True, False, True]


def test_validation_weighs_tokens_and_leaves_training_alone():
    quiet, watched = toy_trainer(epochs=2), toy_trainer(valid=RAGGED[:5], epochs=2, valid_every=1)
    assert [r.loss for r in quiet] == [r.loss for r in watched]
    expected = mean_loss(watched.model, watched.data.valid, 1)
    assert watched.reports[-1].valid_loss == pytest.approx(expected, rel=1e-5)


def test_two_runs_with_dropout_are_equal_bit_for_bit():
    one, two = (toy_trainer(dropout=0.3, epochs=3) for _ in range(2))
    assert [computed(report) for report in one] == [computed(report) for report in two]
    assert state_of(one) == state_of(two)
    other = toy_trainer(dropout=0.3, epochs=3, seed=1)
    assert [report.loss for report in other] != [report.loss for report in one.reports]


def test_a_second_trainer_goes_on_from_the_firsts_weights():
    first = toy_trainer(epochs=4)
    list(first)
    second = Trainer(first.base, first.data, first.config)
    assert second.steps_done == 0
    reports = list(second)
    assert reports[0].loss < first.reports[0].loss
    assert len(reports) == len(first.reports)


def test_leaving_the_loop_and_coming_back_goes_on():
    whole, parts = toy_trainer(epochs=3, dropout=0.2), toy_trainer(epochs=3, dropout=0.2)
    list(whole)
    for report in parts:
        if report.step == 2:
            break
    mx.random.seed(99)  # what the user does between changes nothing
    assert next(iter(parts)).step == 3
    assert len([parts.step(), *parts]) == 3
    assert [computed(r) for r in parts.reports] == [computed(r) for r in whole.reports]
    assert state_of(parts) == state_of(whole)


def test_a_finished_training_makes_no_further_step():
    trainer = toy_trainer(steps=1)
    assert len(list(trainer)) == 1
    assert list(trainer) == []
    with pytest.raises(TrainingError, match="all 1 steps have been made"):
        trainer.step()


@pytest.mark.parametrize("limit", [None, 12_345])
def test_the_cache_limit_holds_while_iterating_and_is_restored(limit):
    before = mx.set_cache_limit(54_321_000)
    try:
        inside = []
        for report in toy_trainer(epochs=2, cache_limit_bytes=limit):
            inside.append(mx.set_cache_limit(0))
            mx.set_cache_limit(inside[-1])
            if report.step == 2:
                break
        assert len(set(inside)) == 1
        assert inside[0] != 54_321_000
        assert limit is None or inside[0] == limit
        assert mx.set_cache_limit(before) == 54_321_000
        mx.set_cache_limit(54_321_000)
        with pytest.raises(RuntimeError, match="planted"):
            list(toy_trainer(loss_fn=FailAt(1, fail)))
        list(toy_trainer())
    finally:
        assert mx.set_cache_limit(before) == 54_321_000


def test_a_cache_limit_bounds_the_cache_and_changes_no_result():
    free, bound = toy_trainer(epochs=2), toy_trainer(epochs=2, cache_limit_bytes=0)
    assert [r.loss for r in free] == [r.loss for r in bound]
    assert all(report.cache_bytes == 0 for report in bound.reports)
    assert max(report.cache_bytes for report in free.reports) > 0


def test_200_steps_leak_no_memory():
    reports = list(toy_trainer(steps=200, micro_batch_size=2))
    steps = [report.step for report in reports]
    slope = np.polyfit(steps, [report.active_bytes for report in reports], 1)[0]
    assert abs(slope) <= 100  # bytes a step; 0.1 MB would be a third of this whole model


def test_the_peak_is_counted_from_the_beginning_of_the_training():
    huge = mx.zeros(50_000_000) + 1
    mx.eval(huge)
    del huge
    report = toy_trainer().step()
    assert 0 <= report.peak_bytes - report.active_bytes < 100_000_000


def test_the_learning_rate_follows_the_schedule():
    trainer = toy_trainer(steps=5, warmup_steps=2, learning_rate=1.0, min_learning_rate=0.5,
                          schedule="linear")  # fmt: skip
    rates = [trainer.learning_rate(step) for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 2 / 3])


def test_a_report_reads_as_one_line():
    report = toy_trainer(valid=[9]).step()
    assert "valid" not in str(report)
    assert str(report).startswith(f"step 1/2  loss {report.loss:.4f}  lr")
