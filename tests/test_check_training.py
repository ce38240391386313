"""What `check_training` says of a loss, a model and a step: places, numbers, causes."""

from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.mutants_targets import mlx_lm_default_loss
from tests.mutants_updates import never_evaluated, right_step
from tests.toy import toy_model
from tests.toy_checks import BATCH, EVEN, MICRO_BATCHES, adapted, checked, failure, mean_loss
from workbench.data.batches import Batch
from workbench.probes.training import HEADINGS
from workbench.probes.training_checks.subject import Rows
from workbench.tuning.losses import cross_entropy, plain_loss, supervised_loss


def test_headings_come_in_order_and_none_is_left_out():
    for report in (checked(), checked(lambda model, batch: None), checked(mode="frozen")):
        checks = [finding.check for finding in report.findings]
        assert set(checks) == set(HEADINGS)
        assert checks == sorted(checks, key=HEADINGS.index)


def test_the_pad_target_of_mlx_lm_is_counted_and_named():
    report = checked(mlx_lm_default_loss)
    found = failure(report, "padding")
    padded_rows = (BATCH.tokens[:, -1] == 0).sum()
    assert found.detail.startswith(f"{padded_rows} padding targets"), version("mlx-lm")
    assert "mlx-lm" in found.cause
    assert report.failed_checks == {"padding"}


def test_a_shift_is_measured_in_places():
    def shifted_by(places):
        def loss_fn(model, batch):
            tokens = mx.array(batch.tokens)
            return cross_entropy(model(tokens)[:, :-places], tokens[:, places:]).sum()

        return loss_fn

    for places in (2, 3, 4):
        detail = failure(checked(shifted_by(places), batch=EVEN), "shift").detail
        assert f"token at t + {places} " in detail


def test_inputs_that_are_cut_wrongly_are_seen_although_all_fits():
    def loss_fn(model, batch):
        tokens = mx.array(batch.tokens)
        return cross_entropy(model(tokens[:, 1:]), tokens[:, 1:]).sum()

    assert "token at t + 0 " in failure(checked(loss_fn, batch=EVEN), "shift").detail


def test_repeated_tokens_do_not_pass_for_a_right_shift():
    batch = Batch(np.full((1, 6), 9, dtype=np.int32), np.ones((1, 6), dtype=bool), (0,))
    assert checked(batch=batch).status("shift") == "not applicable"
    tokens = np.array([[9, 9, 9, 9, 20, 9]], dtype=np.int32)
    batch = Batch(tokens, np.ones((1, 6), dtype=bool), (0,))
    assert checked(batch=batch).status("shift") == "ok"


def test_a_wrong_target_is_found_at_its_place():
    def loss_fn(model, batch):
        tokens = np.array(batch.tokens)
        tokens[1, 5] += 1
        return cross_entropy(model(mx.array(batch.tokens)[:, :-1]), mx.array(tokens)[:, 1:]).sum()

    found = failure(checked(loss_fn, batch=EVEN), "shift")
    assert found.detail.startswith("1 of ")
    assert "row 1 at position 4" in found.detail


def test_a_missing_target_is_found_at_its_place():
    def loss_fn(model, batch):
        mask = batch.loss_mask.copy()
        mask[2, 4] = False
        return plain_loss(model, Batch(batch.tokens, mask, batch.rows))

    found = failure(checked(loss_fn, batch=EVEN), "mask")
    assert "1 missing, first row 2 at position 4" in found.detail


def test_a_loss_that_goes_row_by_row_is_read_too():
    def loss_fn(model, batch):
        rows = zip(batch.tokens, batch.loss_mask)
        return sum(plain_loss(model, Batch(t[None], m[None], (0,))) for t, m in rows)

    report = checked(loss_fn)
    assert report.ok, str(report)
    assert report.status("mask") == "ok"


def test_a_loss_past_the_logits_is_said_not_to_apply():
    def loss_fn(model, batch):
        hidden_states = model.model.norm(model.model.embed_tokens(mx.array(batch.tokens)))
        return hidden_states.square().sum()

    finding = next(f for f in checked(loss_fn).findings if f.check == "shift")
    assert finding.status == "not applicable"
    assert ".model" in finding.detail


def test_a_loss_inside_the_model_is_said_not_to_apply():
    class WithLoss(type(toy_model())):
        def __call__(self, tokens, targets=None):
            logits = self.head(self.backbone(tokens))
            return logits if targets is None else cross_entropy(logits, targets).mean()

    def loss_fn(model, batch):
        tokens = mx.array(batch.tokens)
        return model(tokens[:, :-1], tokens[:, 1:])

    model = adapted()
    model.__class__ = WithLoss
    report = checked(loss_fn, model)
    assert report.ok, str(report)
    assert {report.status(c) for c in ("shift", "mask", "reduction")} == {"not applicable"}


def test_a_model_that_returns_more_than_logits_is_read_too():
    class WithCache(type(toy_model())):
        def __call__(self, tokens, cache=None, padding=None):
            return super().__call__(tokens, cache, padding), "cache"

    model = adapted()
    model.__class__ = WithCache
    report = checked(model=model)
    assert report.ok, str(report)
    assert report.status("mask") == "ok"


def test_sum_and_mean_are_told_apart():
    details = [
        next(f.detail for f in checked(loss_fn).findings if f.check == "reduction")
        for loss_fn in (plain_loss, mean_loss)
    ]
    assert details[0].startswith("a sum")
    assert details[1].startswith("a mean")


def test_the_error_of_unweighted_micro_batches_is_given_in_percent():
    def averaged(model, batches):
        gradients = [nn.value_and_grad(model, mean_loss)(model, batch)[1] for batch in batches]
        return tree_map(lambda *g: sum(g) / len(g), *gradients)

    report = checked(mean_loss, batch=MICRO_BATCHES, gradients=averaged)
    assert " % off" in failure(report, "reduction").detail
    even = checked(mean_loss, batch=[EVEN, EVEN], gradients=averaged)
    assert even.ok, str(even)  # the same numbers of targets: no difference


def test_label_smoothing_is_no_fault():
    def loss_fn(model, batch):
        tokens, mask = mx.array(batch.tokens), mx.array(batch.loss_mask)
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], label_smoothing=0.1)
        return (losses * mask[:, 1:]).sum()

    report = checked(loss_fn)
    assert report.ok, str(report)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_of_mlx_lm_raise_no_alarm(use_dora):
    model = toy_model()
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.1}, use_dora)
    report = checked(model=model)
    assert report.ok, str(report)
    assert report.status("lora_a") == "ok"


def test_a_trained_adapter_raises_no_alarm():
    model, optimizer = adapted(), optim.AdamW(1e-2)
    for _ in range(2):
        right_step(model, optimizer, BATCH)
    report = checked(model=model)
    assert report.ok, str(report)
    assert report.status("lora_a") == "not applicable"


def test_frozen_parameters_are_watched_where_nothing_trains():
    model = toy_model()
    model.freeze()

    def step(batch):
        model.update(tree_map(lambda p: p + 1, model.parameters()))

    assert checked(model=model, mode="frozen").ok
    assert "frozen" in checked(model=model, mode="frozen", step=step).failed_checks


def test_padding_is_the_end_after_the_last_target_that_repeats_one_id():
    tokens = np.array([[5, 6, 7, 0, 0], [5, 6, 0, 0, 0], [5, 6, 7, 8, 9], [5, 6, 7, 8, 0]])
    mask = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], bool)
    padding = Rows(None, tokens, mask).padding
    assert padding.sum(axis=1).tolist() == [2, 2, 0, 0]  # a target is no padding, nor is another id


def test_the_growth_of_the_graph_is_counted():
    model, optimizer = adapted(), optim.AdamW(1e-3)
    report = checked(model=model, step=lambda batch: never_evaluated(model, optimizer, batch))
    first, _, third = map(
        int, failure(report, "evaluation").detail.split(" operations")[0].split(",")
    )
    assert third > 2 * first > 0


@pytest.mark.parametrize("loss_fn", [plain_loss, supervised_loss])
def test_a_toy_model_is_checked_quickly(loss_fn):
    assert checked(loss_fn).seconds < 3
