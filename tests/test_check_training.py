"""Training code with a fault is caught under the right heading; right code raises no alarm."""

from importlib.metadata import version
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.mutants_training import (
    BATCH,
    CORRECT,
    EVEN,
    MICRO_BATCHES,
    MUTANTS,
    adapted,
    checked,
    mean_loss,
    mlx_lm_default_loss,
    never_evaluated,
    right_step,
)
from tests.toy import toy_model
from workbench.data.batches import Batch
from workbench.errors import ConfigError, DataError
from workbench.probes.parameters import fingerprint
from workbench.probes.training import HEADINGS, check_training
from workbench.probes.training_checks.preserving import prepared, preserved
from workbench.probes.training_checks.subject import Rows
from workbench.tuning.losses import cross_entropy, plain_loss, supervised_loss


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_is_caught_under_its_heading(mutant):
    report = mutant.run()
    assert mutant.check in report.failed_checks, str(report)
    assert all(finding.detail and finding.cause for finding in report.failures)


@pytest.mark.parametrize(("name", "run"), CORRECT, ids=[name for name, _ in CORRECT])
def test_right_code_raises_no_alarm(name, run):
    report = run()
    assert report.ok, str(report)


def test_headings_come_in_order_and_none_is_left_out():
    for report in (checked(), checked(lambda model, batch: None), checked(mode="frozen")):
        checks = [finding.check for finding in report.findings]
        assert set(checks) == set(HEADINGS)
        assert checks == sorted(checks, key=HEADINGS.index)


# What a report says


def failure(report, check):
    """The only failure under a heading."""
    (found,) = [finding for finding in report.failures if finding.check == check]
    return found


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


# Everything is as before


def picture(model, optimizer):
    """All that a check could change, as it is now."""
    flags = [(p, set(m._no_grad), m.training) for p, m in model.named_modules()]
    state = {name: np.array(array) for name, array in tree_flatten(optimizer.state)}
    return fingerprint(model), sorted(flags, key=lambda flag: flag[0]), state


def same(one, other):
    """Whether two pictures are equal."""
    state, again = one[2], other[2]
    is_equal = state.keys() == again.keys()
    return one[:2] == other[:2] and is_equal and all((state[n] == again[n]).all() for n in state)


def meddling(model, optimizer):
    """A step that changes whatever it can, in place where it can."""

    def step(batch):
        right_step(model, optimizer, batch)
        model.model.norm.weight += 1.0
        model.unfreeze()
        model.train()
        model.layers.append(model.layers[0])
        model.another = mx.zeros(3)
        model.scale = 3.0
        mx.random.seed(5)
        return 0.0

    return step


def test_everything_is_as_before():
    model, optimizer = adapted(dropout=0.3), optim.AdamW(1e-3)
    model.train()
    right_step(model, optimizer, BATCH)
    before, random = picture(model, optimizer), mx.random.state[0].tolist()
    holds = model.state, optimizer.state, model.layers
    report = checked(model=model, step=meddling(model, optimizer), optimizer=optimizer)
    assert not report.ok
    assert same(before, picture(model, optimizer))
    assert mx.random.state[0].tolist() == random
    assert not hasattr(model, "scale")
    # A compiled step holds on to these objects.
    assert all(a is b for a, b in zip(holds, (model.state, optimizer.state, model.layers)))
    right_step(model, optimizer, BATCH)


@pytest.mark.parametrize("fault", [KeyError("a"), KeyboardInterrupt()])
def test_everything_is_as_before_when_the_loss_raises(fault):
    model, calls = adapted(), []
    before = picture(model, optim.AdamW(1e-3))

    def loss_fn(model, batch):
        calls.append(batch)
        if len(calls) > 5:
            raise fault
        return plain_loss(model, batch)

    if isinstance(fault, Exception):
        assert not checked(loss_fn, model).ok
    else:
        with pytest.raises(KeyboardInterrupt):
            checked(loss_fn, model)
    assert same(before, picture(model, optim.AdamW(1e-3)))


def test_an_optimizer_that_was_never_used_is_still_unused():
    optimizer = optim.AdamW(1e-3)
    checked(optimizer=optimizer)
    assert set(optimizer.state) == {"step", "learning_rate"}
    assert optimizer.step.item() == 0


def test_tied_arrays_stay_one_object():
    model = toy_model()
    model.tied = model.model.norm.weight
    with preserved(model):
        model.model.norm.weight = model.model.norm.weight + 1
    assert model.tied is model.model.norm.weight


def test_half_precision_is_looked_at_in_float32():
    model = toy_model()
    model.set_dtype(mx.bfloat16)
    before = fingerprint(model)
    with prepared(model):
        assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    assert fingerprint(model) == before
    report = checked(model=model, mode="full")
    assert report.status("finite differences") == "ok", str(report)


# The rows


def test_padding_is_the_end_after_the_last_target_that_repeats_one_id():
    tokens = np.array([[5, 6, 7, 0, 0], [5, 6, 0, 0, 0], [5, 6, 7, 8, 9], [5, 6, 7, 8, 0]])
    mask = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], bool)
    padding = Rows(None, tokens, mask).padding
    assert padding.sum(axis=1).tolist() == [2, 2, 0, 0]  # a target is no padding, nor is another id


# Bad input


def rows(tokens, mask=None):
    """A batch of any arrays."""
    tokens = np.array(tokens)
    return SimpleNamespace(tokens=tokens, loss_mask=np.ones(tokens.shape) if mask is None else mask)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([], "no batch"),
        (rows(np.zeros((0, 4), dtype=int)), "nothing to predict"),
        (rows([[5]]), "nothing to predict"),
        (rows([5, 6, 7]), "must both be"),
        (rows([[5, 6, 7]], np.ones((1, 2))), "must both be"),
        (rows([[5, 6, 7]], np.zeros((1, 3))), "no target"),
        (rows([[5, 6, 7]], np.array([[1, 0, 0]])), "no target"),
        (rows([[5, 6, 10**6]]), "row 0, position 2: token id 1000000 is outside"),
        (rows([[5, -1, 6]]), "token id -1 is outside"),
        (rows([[5.0, 6.0, 7.0]]), "whole numbers"),
        (rows([[5, 6, 7]], np.array([[0, 2, 1]])), "True and False"),
        (rows([[5, 6, 7]], np.array([[0, np.nan, 1]])), "True and False"),
        (np.array([[5, 6, 7]]), "has no .tokens"),
        (None, "has no .tokens"),
        ([BATCH, rows([[5, 6]], np.zeros((1, 2)))], "micro-batch 1: has no target"),
    ],
)
def test_a_bad_batch_is_a_clear_error(batch, says):
    with pytest.raises(DataError, match=says):
        checked(batch=batch)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mode": "qlora"}, "unknown mode 'qlora'"),
        ({"loss_fn": None}, "loss_fn must be a function"),
        ({"step": 3}, "step must be a function"),
        ({"terms": {"a": 3}}, "term 'a' must be a function"),
        ({"model": SimpleNamespace(model=toy_model())}, "Pass its .model"),
    ],
)
def test_a_bad_argument_is_a_clear_error(given, says):
    with pytest.raises(ConfigError, match=says):
        check_training(**{"model": adapted(), "loss_fn": plain_loss, "batch": BATCH, **given})


def raising(*_):
    """A function that is broken."""
    raise RuntimeError("planted <b>")


@pytest.mark.parametrize(
    ("loss_fn", "says"),
    [
        (raising, "RuntimeError: planted"),
        (lambda model, batch: 3.0, "returned float"),
        (lambda model, batch: None, "returned NoneType"),
        (lambda model, batch: model(mx.array(batch.tokens)), "not a scalar"),
        (lambda model, batch: plain_loss(model, batch) * mx.nan, "nan"),
        (lambda model, batch: plain_loss(model, batch) / mx.array(0.0), "inf"),
    ],
)
def test_a_broken_loss_is_a_finding(loss_fn, says):
    report = checked(loss_fn)
    assert says in failure(report, "loss").detail
    assert report.failed_checks == {"loss"}


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ({"step": raising}, "movement"),
        ({"gradients": raising}, "gradients"),
        ({"gradients": lambda model, batches: 3}, "gradients"),
        ({"terms": {"a": raising}}, "loss terms"),
        ({"terms": {"a": lambda model, batch: 0.0}}, "loss terms"),
    ],
)
def test_broken_code_is_a_finding(given, check):
    report = checked(**given)
    assert report.failed_checks == {check}, str(report)


def test_a_broken_model_is_a_finding():
    class Broken(type(toy_model())):
        def __call__(self, tokens, cache=None, padding=None):
            raise RuntimeError("planted")

    model = adapted()
    model.__class__ = Broken
    assert "planted" in failure(checked(model=model), "loss").detail


def test_a_model_with_nan_is_a_finding():
    model = adapted()
    model.model.norm.weight = model.model.norm.weight * mx.nan
    assert "nan" in failure(checked(model=model), "loss").detail


def test_what_is_shown_as_html_is_escaped():
    report = checked(terms={"<script>": lambda model, batch: mx.array(1.0)}, step=raising)
    shown = report._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "planted &lt;b&gt;" in shown


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
