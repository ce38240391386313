"""The frozen layers' states are kept for any architecture that can begin at a layer."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.architectures import ARCHITECTURES
from tests.toy_architectures import small, small_base, small_rows
from workbench.data.batches import collate
from workbench.data.datasets import Dataset
from workbench.errors import ConfigError, FallbackWarning
from workbench.models.partial_runs import begun_at, entering, paths_above, try_beginning_at
from workbench.models.stand_ins import intercepted
from workbench.models.structure import find_layers
from workbench.probes.parameters import fingerprint
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import default_loss, plain_loss
from workbench.tuning.prefix import first_layer
from workbench.tuning.prefix_cache import PrefixCache, PrefixLoss
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import accumulate

ROWS = small_rows([7, 12, 5, 9])
REFUSED = {
    "gemma4_text": "layer 2 gives a tuple",  # keys and values that later layers share
    "rwkv7": "layer 0 gives a tuple",  # the first layer's values go to all
}


@pytest.fixture(scope="module", autouse=True)
def _without_compilation():
    mx.disable_compile()
    yield
    mx.enable_compile()


def adapted(name: str, **config) -> tuple[nn.Module, int]:
    """A tiny network whose last layer alone has an adapter, and that layer's number."""
    model = small(name)
    add_lora(model, LoRAConfig(rank=4, num_layers=1, **config))
    for _, module in model.named_modules():  # so that lora_a has a gradient
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    return model, find_layers(model)[1] - 1


def loss_and_gradients(model, loss_fn, batch) -> tuple[float, dict[str, np.ndarray]]:
    loss, gradients = accumulate(model, loss_fn, [batch], seed=3)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


def assert_as_plain(model, loss_fn, batch):
    loss, gradients = loss_and_gradients(model, loss_fn, batch)
    plain, wanted = loss_and_gradients(model, plain_loss, batch)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        bound = 1e-4 * (np.abs(gradient).max() + 1e-3)
        assert np.abs(gradients[name] - gradient).max() <= bound, name


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
def test_loss_and_gradients_are_the_plain_ones(name):
    model, last = adapted(name)
    assert first_layer(model) == (last, "")
    try_beginning_at(model, last)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name != "talkie" else "ignore")
        loss_fn = PrefixLoss(PrefixCache(model, last, 10**9, ROWS), default_loss(model))
    for rows in ([0, 1, 2], [3]):
        assert_as_plain(model, loss_fn, collate(ROWS, rows))
    assert loss_fn.cache.misses == len(ROWS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_gives_more_than_one_array_is_refused_by_name(name):
    model, _ = adapted(name)
    first, reason = first_layer(model)
    assert first == 0
    assert reason.startswith(REFUSED[name])


def trainer_of(name: str, asked: bool | None, **settings) -> Trainer:
    base = small_base(name)
    base.model, _ = adapted(name)
    given = {"micro_batch_size": 2, "learning_rate": 1e-2, "epochs": 3, **settings}
    return Trainer(base, Dataset("toy", ROWS, ROWS[:2]), TrainConfig(prefix_cache=asked, **given))


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "mamba2", "talkie"])
@pytest.mark.parametrize("switches", [{}, {"grad_checkpoint": True}])
@pytest.mark.filterwarnings("ignore:logits at every position")  # talkie's
def test_a_run_is_the_plain_run_but_for_rounding(name, switches):
    kept, plain = (trainer_of(name, asked, valid_every=3, **switches) for asked in (True, False))
    assert kept.prefix.used
    assert not plain.prefix.used
    for one, other in zip(kept, plain, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert (one.valid_loss or 0) == pytest.approx(other.valid_loss or 0, rel=1e-4)
    assert kept.prefix.cache.misses == len(ROWS)
    assert kept.prefix.cache.hits > len(ROWS)


def test_it_is_refused_aloud_if_it_was_asked_for():
    with pytest.warns(FallbackWarning, match="no prefix cache: layer 2 gives a tuple"):
        trainer = trainer_of("gemma4_text", True)
    assert "layer 2 gives a tuple" in str(trainer.prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trainer_of("gemma4_text", None).prefix.used
    assert len(list(trainer)) == 6


def test_left_open_it_is_used():
    assert trainer_of("phi3", None).prefix.used


def test_a_trained_embedding_is_named_and_a_trained_head_is_not_below():
    model, last = adapted("gpt_neox")
    model.model.embed_out.unfreeze()
    model.model.final_layer_norm.unfreeze()
    assert first_layer(model) == (last, "")
    model.model.embed_in.unfreeze()
    assert first_layer(model) == (0, "model.embed_in.weight trains, and is used below the layers")


def test_a_tied_head_that_trains_is_below_and_above():
    model, _ = adapted("gemma2")
    assert paths_above(model) == ("model.norm",)
    model.model.embed_tokens.unfreeze()
    assert "embed_tokens" in first_layer(model)[1]


def test_the_head_alone_begins_behind_the_last_layer():
    model = small("qwen3")
    model.freeze()
    model.lm_head.unfreeze()
    assert first_layer(model) == (2, "")
    loss_fn = PrefixLoss(PrefixCache(model, 2, 10**9), default_loss(model))
    assert_as_plain(model, loss_fn, collate(ROWS, range(4)))


class Told(nn.Module):
    """A network that calls its layers as it is told."""

    def __init__(self, order=(0, 1, 2), layers=()):
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)
        self.layers, self.order = list(layers) or [nn.Linear(8, 8) for _ in range(3)], order

    def __call__(self, tokens):
        x = self.embed(tokens)
        for number in self.order:
            x = self.layers[number](x)
        return self.head(x)


@pytest.mark.parametrize("order", [[2, 1, 0], [0, 1, 2, 0, 1, 2], [0, 2], []])
def test_layers_that_are_not_called_in_turn_are_refused(order):
    model = Told(order)
    model.freeze()
    model.layers[2].unfreeze()
    assert first_layer(model) == (0, "its layers are not called one after another, each once")


class Normed(Told):
    """A network whose norm is used before the layers and after them."""

    def __call__(self, tokens):
        x = self.norm(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(self.norm(x)))


def test_a_module_that_is_used_before_and_after_the_layers_is_below_them():
    model = Told()
    model.norm, model.last = nn.RMSNorm(8), nn.RMSNorm(8)
    model.__class__ = Normed
    assert paths_above(model) == ("last", "head")


@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_layers_below_do_not_run_and_those_above_do(first):
    model, ran = Told(), []
    states = entering(model, first, ROWS[0].tokens[None])
    calls = {f"layers.{n}": lambda layer, x, n=n: ran.append(n) or layer(x) for n in range(3)}
    with intercepted(model, calls), begun_at(model, first, states) as begun:
        begun(mx.array(ROWS[0].tokens[None]))
    assert ran == list(range(first, 3))


class Remembering(nn.Linear):
    """A layer that also looks at what entered the first of them."""

    def __call__(self, x):
        if self.number == 0:
            self.seen[:] = [x]
        return super().__call__(x + (self.seen[0] if self.seen else 0))


def test_a_layer_that_sees_past_the_one_below_is_refused_by_the_trial():
    layers, seen = [Remembering(8, 8) for _ in range(3)], []
    for number, layer in enumerate(layers):
        object.__setattr__(layer, "number", number)
        object.__setattr__(layer, "seen", seen)  # one list, shared past the network's back
    try_beginning_at(Told(layers=[nn.Linear(8, 8) for _ in range(3)]), 2)
    with pytest.raises(ConfigError, match="begun at layer 2, it gives logits that differ"):
        try_beginning_at(Told(layers=layers), 2)


def test_trying_and_running_a_part_leave_everything_in_its_place():
    model, last = adapted("olmoe")
    before, layers = fingerprint(model), list(model.layers)
    try_beginning_at(model, last)
    tokens = ROWS[0].tokens[None]
    with (
        pytest.raises(ValueError, match="planted"),
        begun_at(model, last, entering(model, last, tokens)),
    ):
        raise ValueError("planted")
    assert fingerprint(model) == before
    assert all(one is other for one, other in zip(model.layers, layers, strict=True))
