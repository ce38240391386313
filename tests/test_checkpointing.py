"""Layers that are computed again: the same loss and gradients from less memory."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.architectures import ARCHITECTURES
from tests.test_losses import moved_lora_model
from tests.toy import toy_examples, toy_model
from tests.toy_training import computed, state_of, toy_trainer
from workbench.data.batches import collate
from workbench.errors import FallbackWarning
from workbench.models.checkpointing import checkpointed_layers
from workbench.models.llama import DecoderLayer
from workbench.tuning.losses import plain_loss, supervised_loss
from workbench.tuning.update import accumulate

BATCHES = [collate(toy_examples([9, 5, 12]), rows) for rows in ([0, 1], [2])]
SMALL_IDS = [collate(toy_examples([7, 5]), [0, 1])]  # for the small vocabularies of mlx-lm's toys
SMALL_IDS[0].tokens[:] %= 40
FOREIGN = ("qwen3", "gemma2", "gpt_bigcode", "mixtral", "mamba", "qwen3_next", "gemma4_text")
DEEP = {"num_hidden_layers": 8, "intermediate_size": 512}


class Gained(DecoderLayer):
    """A layer with a parameter of its own, which counts its calls."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = mx.array([1.5])
        self.calls = 0

    def __call__(self, x, mask, cache=None):
        self.calls += 1
        return super().__call__(x, mask, cache) * self.gain


class Unlisted(nn.Module):
    """A network that keeps no layers in a list."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(40, 8), nn.Linear(8, 40)

    def __call__(self, tokens):
        return self.lm_head(self.embed_tokens(tokens))


def head_only():
    model = toy_model()
    model.freeze()
    model.model.norm.unfreeze()
    model.model.embed_tokens.unfreeze()
    return model


def partly_frozen():
    model = toy_model()
    model.layers[0].freeze()
    model.layers[1].mlp.freeze()
    return model


def quantised():
    model = moved_lora_model()
    nn.quantize(model, group_size=32, bits=8)
    return model


def gained():
    model = toy_model()
    model.model.layers = [Gained(model.config) for _ in model.layers]
    mx.eval(model.parameters())
    return model


def dropping():
    return moved_lora_model(dropout=0.5)


BUILDS = [toy_model, moved_lora_model, dropping, head_only, partly_frozen, quantised, gained]


def step(model, again, loss_fn=supervised_loss, seed=3):
    """Loss, and gradients by name."""
    loss, gradients = accumulate(model, loss_fn, BATCHES, seed, again)
    return loss.item(), dict(tree_flatten(gradients))


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        assert mx.array_equal(one[1][name], other[1][name]), name


@pytest.mark.parametrize("build", BUILDS)
def test_loss_and_gradients_are_equal_to_the_bit(build):
    model = build()
    plain = step(model, False)
    assert any(mx.abs(gradient).max().item() > 0 for gradient in plain[1].values())
    assert_same(step(model, True), plain)
    assert_same(step(model, True), plain)  # and once more, on what the first time left


@pytest.mark.parametrize("name", FOREIGN)
def test_mlx_lm_architectures_have_equal_loss_and_gradients(name):
    model = ARCHITECTURES[name].build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        loss, gradients = accumulate(model, plain_loss, SMALL_IDS, 0, True)
    expected, wanted = accumulate(model, plain_loss, SMALL_IDS, 0)
    assert loss.item() == expected.item()
    wanted = dict(tree_flatten(wanted))
    for path, gradient in tree_flatten(gradients):
        largest = mx.abs(wanted[path]).max().item()
        # Layers that share keys and values get their gradient in another order.
        assert mx.abs(gradient - wanted[path]).max().item() <= 1e-5 * largest, path


def test_dropout_draws_the_same_numbers_again():
    model = dropping()
    assert step(model, True, seed=3)[0] != step(model, True, seed=4)[0]
    streams = []
    for again in (False, True):
        step(model, again)
        streams.append(mx.random.state[0].tolist())
    assert streams[0] == streams[1]  # whoever draws next gets the same, too


def test_a_layer_without_random_numbers_leaves_the_stream_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(mx.random, "seed", seeds.append)
    step(moved_lora_model(), True, seed=5)
    assert seeds == [5]


def test_every_layer_runs_twice_and_nested_blocks_add_nothing():
    model = gained()
    for calls in (2, 4):  # twice in a row
        with checkpointed_layers(model), checkpointed_layers(model):
            mx.eval(nn.value_and_grad(model, supervised_loss)(model, BATCHES[0]))
        assert [layer.calls for layer in model.layers] == [calls] * len(model.layers)


def test_peak_memory_is_lower():
    model = toy_model(**DEEP)
    peaks = []
    for again in (False, True):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        batch = collate(toy_examples([65] * 4), range(4))
        accumulate(model, supervised_loss, [batch], 0, again)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.6 * peaks[0]


def test_gradients_that_nobody_wants_keep_nothing_alive():
    model, batch = toy_model(**DEEP), collate(toy_examples([65] * 4), range(4))
    before = mx.get_active_memory()
    with checkpointed_layers(model):
        loss, gradients = nn.value_and_grad(model, supervised_loss)(model, batch)
    mx.eval(loss)
    del gradients
    assert mx.get_active_memory() <= before + 10_000
    mx.eval(accumulate(model, supervised_loss, [batch], 0, True)[0])
    assert mx.get_active_memory() <= before + 10_000


def census(model):
    """Everything that a block could leave on a model, but for the numbers."""
    places = [(path, id(module), type(module)) for path, module in model.named_modules()]
    flags = [(sorted(m._no_grad), m.training) for _, m in model.named_modules()]
    names = [name for name, _ in tree_flatten(model.parameters())]
    return places, flags, names, id(model.model.layers), [*vars(DecoderLayer)]


def test_nothing_stays_on_the_model_and_names_hold_within():
    model = partly_frozen()
    model.eval()
    before = census(model)
    with checkpointed_layers(model):
        assert {name for name, _ in tree_flatten(model.parameters())} == set(before[2])
        assert all(isinstance(layer, DecoderLayer) for layer in model.layers)
        assert not any(type(layer) is DecoderLayer for layer in model.layers)
        mx.eval(nn.value_and_grad(model, supervised_loss)(model, BATCHES[0]))
    assert census(model) == before
    step(model, True)
    assert census(model) == before


def test_nothing_stays_after_an_error():
    def fails(model, batch):
        supervised_loss(model, batch)
        raise RuntimeError("planted")

    model = toy_model()
    model.eval()
    before = census(model)
    with pytest.raises(RuntimeError, match="planted"):
        accumulate(model, fails, BATCHES, 0, True)
    assert census(model) == before


def test_what_is_changed_within_a_block_stays_changed():
    model = gained()
    with checkpointed_layers(model):
        model.update({"model": {"layers": [{"gain": mx.array([7.0])}]}})
        model.layers[1].freeze()
        model.eval()
    assert model.layers[0].gain.item() == 7.0
    assert not tree_flatten(model.layers[1].trainable_parameters())
    assert not any(module.training for _, module in model.named_modules())


@pytest.mark.parametrize("inside", [True, False])
def test_a_users_own_value_and_grad(inside):
    def checkpointed(model, batch):
        with checkpointed_layers(model):
            return supervised_loss(model, batch)

    model = moved_lora_model()
    expected = nn.value_and_grad(model, supervised_loss)(model, BATCHES[0])
    if inside:
        found = nn.value_and_grad(model, checkpointed)(model, BATCHES[0])
    else:
        with checkpointed_layers(model):
            found = nn.value_and_grad(model, supervised_loss)(model, BATCHES[0])
    for form in (found, expected):
        mx.eval(form)
    assert_same(*((loss.item(), dict(tree_flatten(g))) for loss, g in (found, expected)))


def test_a_layer_that_stands_in_the_network_twice_gets_the_sum():
    model = toy_model()
    model.model.layers = [model.layers[0], model.layers[0]]
    plain = step(model, False)
    found = step(model, True)
    assert found[0] == plain[0]
    for name, gradient in found[1].items():
        assert np.allclose(gradient, plain[1][name], rtol=1e-4, atol=1e-5), name


def test_a_network_whose_layers_are_not_found_falls_back_and_says_so():
    model = Unlisted()
    with pytest.warns(FallbackWarning, match="cannot find the layers"):
        loss, _ = accumulate(model, plain_loss, SMALL_IDS, 0, True)
    assert loss.item() == accumulate(model, plain_loss, SMALL_IDS, 0)[0].item()


def test_a_layer_with_a_cache_falls_back_and_says_so():
    model, tokens = toy_model(), mx.array([[5, 9, 100, 33]])
    cache = model.make_cache()
    model(tokens[:, :2], cache)
    with checkpointed_layers(model), pytest.warns(FallbackWarning, match="KVCache"):
        logits = model(tokens[:, 2:], cache)
    assert cache[0].offset == 4
    assert np.allclose(logits, model(tokens)[:, 2:], atol=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_a_trainer_makes_the_same_steps(full):
    settings = {"epochs": 2, "full": full, "dropout": 0.3, "valid": [8, 11]}
    plain, again = toy_trainer(**settings), toy_trainer(grad_checkpoint=True, **settings)
    assert [computed(report) for report in again] == [computed(report) for report in plain]
    assert state_of(again) == state_of(plain)


def test_a_checkpointed_run_goes_on_bit_for_bit(tmp_path):
    settings = {"dropout": 0.3, "epochs": 2, "grad_checkpoint": True}
    whole = toy_trainer(**settings)
    losses = [report.loss for report in whole]
    first = toy_trainer(run_dir=tmp_path / "run", **settings)
    for report in first:
        if report.step == 2:
            first.stop()
    rest = toy_trainer(run_dir=tmp_path / "run", **settings)
    assert rest.steps_done == 2
    assert [*(r.loss for r in first.reports), *(r.loss for r in rest)] == losses
    assert state_of(rest) == state_of(whole)
