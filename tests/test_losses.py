"""The shift, the mask and cross-entropy."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.toy import toy_examples, toy_model
from workbench.data.batches import collate
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import (
    cross_entropy,
    default_loss,
    mean_loss,
    next_token_pairs,
    plain_loss,
    supervised_loss,
)

BOTH = pytest.mark.parametrize("loss_fn", [plain_loss, supervised_loss])
EXAMPLES = toy_examples([9, 5, 12])
BATCH = collate(EXAMPLES, [0, 1, 2])


def log_probability(logits, token):
    """In float64, by the textbook."""
    logits = logits.astype(np.float64)
    return logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def by_hand(model, examples):
    """Row by row without padding: token t is predicted from the logits at t - 1."""
    total = 0.0
    for example in examples:
        logits = np.array(model(mx.array(example.tokens)[None]))[0]
        for t in range(1, len(example)):
            if example.loss_mask[t]:
                total -= log_probability(logits[t - 1], example.tokens[t])
    return total


def gradients_of(loss_fn, model, batch=BATCH):
    return dict(tree_flatten(nn.value_and_grad(model, loss_fn)(model, batch)[1]))


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, mx.abs(other[name]).max().item())
        assert mx.abs(one[name] - other[name]).max().item() <= tolerance * scale, name


def moved_lora_model(dropout=0.0):
    """With an adapter whose lora_b has left zero, so that both factors get gradient."""
    model = toy_model()
    add_lora(model, LoRAConfig(rank=2, alpha=4, dropout=dropout))
    for place, (name, array) in enumerate(tree_flatten(model.trainable_parameters())):
        noise = 0.1 * mx.random.normal(array.shape, key=mx.random.key(place))
        model.update(tree_unflatten([(name, noise)]))
    return model


def test_logits_are_trained_against_the_next_token():
    tokens, mask = np.arange(10).reshape(2, 5), np.arange(10).reshape(2, 5) % 2 == 0
    inputs, targets, loss_mask = next_token_pairs(tokens, mask)
    assert np.array_equal(inputs, tokens[:, :-1])
    assert np.array_equal(targets, inputs + 1)
    assert np.array_equal(loss_mask, targets % 2 == 0)


@BOTH
def test_loss_equals_cross_entropy_by_hand(loss_fn):
    model = toy_model()
    expected = by_hand(model, EXAMPLES)
    assert loss_fn(model, BATCH).item() == pytest.approx(expected, rel=1e-5)


@BOTH
@pytest.mark.parametrize("shift", [0, 2])
def test_another_shift_would_give_another_value(loss_fn, shift):
    model, total = toy_model(), 0.0
    for example in EXAMPLES:
        logits = np.array(model(mx.array(example.tokens)[None]))[0]
        for t in range(max(1, shift), len(example)):
            if example.loss_mask[t]:
                total -= log_probability(logits[t - shift], example.tokens[t])
    assert abs(loss_fn(model, BATCH).item() - total) > 1.0


@BOTH
def test_loss_equals_the_shift_of_transformers(loss_fn):
    # labels = tokens, -100 where unsupervised; logits[:, :-1] against labels[:, 1:]
    model = toy_model()
    labels = np.where(BATCH.loss_mask, BATCH.tokens, -100)
    logits = model(mx.array(BATCH.tokens))[:, :-1].reshape(-1, model.config.vocab_size)
    flat = labels[:, 1:].reshape(-1)
    kept = np.flatnonzero(flat != -100)
    expected = cross_entropy(logits[mx.array(kept)], mx.array(flat[kept])).mean().item()
    assert loss_fn(model, BATCH).item() / BATCH.num_tokens == pytest.approx(expected, rel=1e-5)


@BOTH
def test_rows_count_the_same_padded_or_alone(loss_fn):
    model = toy_model()
    alone = sum(loss_fn(model, collate(EXAMPLES, [row])).item() for row in range(3))
    assert loss_fn(model, BATCH).item() == pytest.approx(alone, rel=1e-6)


@BOTH
def test_what_stands_in_the_padding_changes_nothing(loss_fn):
    model, other = toy_model(), collate(EXAMPLES, [0, 1, 2])
    other.tokens[1, len(EXAMPLES[1]) :] = 77
    assert loss_fn(model, other).item() == loss_fn(model, BATCH).item()
    assert_close(gradients_of(loss_fn, model, other), gradients_of(loss_fn, model), 1e-6)


def test_counting_one_padding_target_would_change_the_sum():
    model, wrong = toy_model(), collate(EXAMPLES, [0, 1, 2])
    wrong.loss_mask[1, len(EXAMPLES[1])] = True
    assert abs(plain_loss(model, wrong).item() - plain_loss(model, BATCH).item()) > 1e-2


@pytest.mark.parametrize("build", [toy_model, moved_lora_model])
def test_both_forms_have_equal_values_and_gradients(build):
    model = build()
    values = [loss_fn(model, BATCH).item() for loss_fn in (plain_loss, supervised_loss)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert_close(gradients_of(plain_loss, model), gradients_of(supervised_loss, model), 1e-5)


@BOTH
@pytest.mark.parametrize("build", [toy_model, moved_lora_model])
def test_gradients_agree_with_finite_differences(loss_fn, build):
    model, random, step = build(), np.random.default_rng(0), 1e-2
    gradients = gradients_of(loss_fn, model)
    parameters = dict(tree_flatten(model.trainable_parameters()))
    chosen = random.choice(sorted(gradients), 8, replace=False)
    for name in [*chosen, max(gradients, key=lambda n: mx.abs(gradients[n]).max().item())]:
        direction = mx.array(random.standard_normal(parameters[name].shape), mx.float32)
        direction = direction / mx.linalg.norm(direction.reshape(-1))
        values = []
        for sign in (step, -step):
            model.update(tree_unflatten([(name, parameters[name] + sign * direction)]))
            values.append(loss_fn(model, BATCH).item())
        model.update(tree_unflatten([(name, parameters[name])]))
        expected = (gradients[name] * direction).sum().item()
        measured = (values[0] - values[1]) / (2 * step)
        assert measured == pytest.approx(expected, rel=2e-2, abs=2e-2), name


def test_a_model_that_returns_a_tuple_is_accepted():
    class WithCache(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toy_model()

        def __call__(self, tokens):
            return self.inner(tokens), "cache"

    model = WithCache()
    assert default_loss(model)(model, BATCH).item() == pytest.approx(
        plain_loss(model, BATCH).item(), 1e-6
    )
    assert plain_loss(model, BATCH).item() == plain_loss(model.inner, BATCH).item()
    assert gradients_of(plain_loss, model)


def test_a_model_in_two_parts_gets_the_faster_form():
    assert default_loss(toy_model()) is supervised_loss


def test_half_precision_logits_lose_nothing_more_in_the_loss():
    logits = (8 * mx.random.normal((4, 50), key=mx.random.key(0))).astype(mx.float16)
    losses = cross_entropy(logits, mx.array([1, 2, 3, 4]))
    assert losses.dtype == mx.float32
    for row, target in enumerate([1, 2, 3, 4]):
        expected = -log_probability(np.array(logits[row]), target)
        assert losses[row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mean_loss_weighs_every_token_alike(batch_size):
    model = toy_model()
    num_targets = sum(example.num_targets for example in EXAMPLES)
    expected = by_hand(model, EXAMPLES) / num_targets
    assert mean_loss(model, EXAMPLES, batch_size) == pytest.approx(expected, rel=1e-5)


def test_mean_loss_runs_without_dropout_and_restores_the_mode():
    model = moved_lora_model(dropout=0.9)
    for training in (True, False):
        model.train(training)
        assert mean_loss(model, EXAMPLES, 2) == mean_loss(moved_lora_model(), EXAMPLES, 2)
        assert {module.training for _, module in model.named_modules()} == {training}


def test_mean_loss_of_nothing_is_none():
    assert mean_loss(toy_model(), [], 4) is None
