"""Rows that begin alike: their beginning is computed once, and the gradients do not notice."""

from __future__ import annotations

import dataclasses
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.test_losses import moved_lora_model
from tests.toy import toy_base, toy_dataset, toy_examples, toy_model
from tests.toy_training import toy_trainer
from workbench.data.batches import collate
from workbench.data.datasets import Dataset, load_dataset
from workbench.data.examples import Example
from workbench.errors import FallbackWarning
from workbench.models.checkpointing import checkpointed_layers
from workbench.models.forms import plain_forms
from workbench.models.layers import Attention
from workbench.models.llama import DecoderLayer
from workbench.models.loading import load_model
from workbench.models.shared_prompt import SharedPrompt, find_shared_prompt
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import fused_loss, plain_loss, supervised_loss
from workbench.tuning.prefix_cache import PrefixCache, PrefixLoss
from workbench.tuning.prompt_sharing import SharedPromptLoss
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import accumulate

SHARED = 12  # tokens that the rows begin with


def rows(lengths=(17, 20, 14, 23), shared=SHARED, supervised_from=SHARED):
    """Examples whose first tokens are alike, supervised from a place on."""
    begin = toy_examples([shared + 1], seed=5)[0].tokens[:shared] if shared else []
    made = []
    for example in toy_examples(lengths, seed=6):
        tokens = np.concatenate([begin, example.tokens[shared:]]).astype(np.int32)
        made.append(Example(tokens, np.arange(len(tokens)) >= supervised_from, example.where))
    return made


def whole_batch(**settings):
    examples = rows(**settings)
    return collate(examples, range(len(examples)))


def sums(model, loss_fn, batch):
    loss, gradients = accumulate(model, loss_fn, [batch], seed=3)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert np.abs(found[1][name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name
    assert any(gradient.any() for gradient in expected[1].values())


MODELS = {"full": toy_model, "lora": moved_lora_model}
BATCHES = {
    "answers only": {},
    "the first answer token follows the shared ones": {"supervised_from": SHARED},
    "some of the shared tokens, too": {"supervised_from": 3},
    "all tokens": {"supervised_from": 0},
    "one token of its own": {"lengths": (14, 14, 14), "shared": 13, "supervised_from": 13},
    "equal rows": {"lengths": (15, 15), "shared": 15, "supervised_from": 8},
    "a row that is shorter than what the others share": {"lengths": (20, 9, 20), "shared": 8},
}


@pytest.mark.parametrize("form", [supervised_loss, fused_loss])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", BATCHES)
def test_loss_and_gradients_are_those_of_the_plain_form(case, kind, form):
    model, batch = MODELS[kind](), whole_batch(**BATCHES[case])
    expected = sums(model, plain_loss, batch)
    assert find_shared_prompt(batch.tokens[:, :-1]) is not None
    assert_same(sums(model, SharedPromptLoss(form), batch), expected)
    assert_same(sums(model, form, batch), expected)
    with plain_forms():
        assert_same(sums(model, SharedPromptLoss(form), batch), expected)


def test_the_tokens_they_share_run_once():
    model, batch, seen = moved_lora_model(), whole_batch(), []

    class Watched(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x):
            seen.append(x.shape)
            return self.inner(x)

    for layer in model.layers:
        layer.mlp = Watched(layer.mlp)
    mx.eval(SharedPromptLoss(supervised_loss)(model, batch))
    packed = SHARED + 4 * (22 - SHARED)  # the longest row has 22 inputs
    width = model.config.hidden_size
    early = [(1, packed, width)] * (len(model.layers) - 1)
    assert seen == [*early, (batch.num_tokens, width)]  # the last layer ends where it counts


def test_layers_of_somebody_elses_run_whole():
    class Foreign(DecoderLayer):
        def __call__(self, x, mask, cache=None):
            return 2 * super().__call__(x, mask, cache)

    model, batch = toy_model(), whole_batch()
    layer = Foreign(model.config)
    layer.update(model.layers[-1].parameters())
    model.layers[-1] = layer
    expected = sums(model, plain_loss, batch)
    assert_same(sums(model, SharedPromptLoss(fused_loss), batch), expected)
    with checkpointed_layers(model):
        assert_same(sums(model, SharedPromptLoss(fused_loss), batch), expected)


def test_places_of_a_packed_batch():
    shared, length = SharedPrompt(length=3, rows=2), 5
    x = mx.arange(2 * length).reshape(2, length)
    x = mx.where(mx.arange(length) < 3, mx.arange(length), x)  # both rows begin with 0 1 2
    packed = shared.pack(x[..., None])[0, :, 0]
    assert packed.tolist() == [0, 1, 2, 3, 4, 8, 9]
    places = shared.places(np.arange(10), length)
    assert packed[mx.array(places)].tolist() == x.reshape(-1).tolist()
    assert shared.unpack(packed[None])[0].tolist() == x[0].tolist()
    assert shared.unpack(packed[None]).tolist() == x.tolist()


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 5, 4]], 2),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 3),  # one position stays each row's own
        ([[1, 2, 3, 4], [2, 2, 3, 4]], None),
        ([[1, 2, 3, 4]], None),
        ([[1], [1]], None),
        ([[1, *range(20)], [1, *range(1, 21)]], None),  # too little
    ],
)
def test_what_rows_begin_with(inputs, expected):
    found = find_shared_prompt(np.array(inputs))
    assert (found and found.length) == expected


def test_it_goes_with_checkpointed_layers():
    model, batch = moved_lora_model(), whole_batch()
    expected = sums(model, supervised_loss, batch)
    with checkpointed_layers(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(sums(model, SharedPromptLoss(fused_loss), batch), expected)


@pytest.mark.parametrize("layers", [1, 0])
def test_it_goes_with_the_prefix_cache(layers):
    model, batch = toy_model(num_hidden_layers=3), whole_batch()
    if layers:
        add_lora(model, LoRAConfig(rank=4, num_layers=layers))
        model.layers[-1].mlp.up_proj.lora_b = mx.random.normal((4, 64)) * 0.1
    else:
        model.freeze()
        model.model.norm.unfreeze()
    expected = sums(model, supervised_loss, batch)
    for examples in ((), rows()):
        cache = PrefixCache(model, 3 - layers, 10**9, examples)
        assert_same(sums(model, PrefixLoss(cache, SharedPromptLoss(fused_loss)), batch), expected)


@pytest.mark.real
def test_a_chat_of_smollm2_trains_alike():
    base = load_model("smollm2-135m", dtype=mx.float32)
    data = load_dataset("capitals", base.tokenizer, limit=8)
    data = dataclasses.replace(data, train=data.train[:8], valid=[], test=[])
    losses = []
    for shared in (True, False):
        add_lora(base.model, LoRAConfig(rank=4))
        config = TrainConfig(steps=3, micro_batch_size=4, shared_prompt=shared)
        trainer = Trainer(base, data, config)
        assert trainer.prompt_sharing.used is shared
        losses.append([report.loss for report in trainer])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_trainer_shares_by_itself_and_says_so():
    data = Dataset("alike", rows())
    shared, apart = (toy_trainer(data=data, shared_prompt=on) for on in (None, False))
    assert "on: the tokens that all rows" in str(shared.prompt_sharing)
    assert "off: switched off" in str(apart.prompt_sharing)
    for one, other in zip(shared, apart, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_dropout_keeps_rows_apart():
    with pytest.warns(FallbackWarning, match=r"no prompt sharing: .*dropout drops out"):
        asked = toy_trainer(dropout=0.1, shared_prompt=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_open = toy_trainer(dropout=0.1)
    for trainer in (asked, left_open):
        assert not trainer.prompt_sharing.used
        assert trainer.loss_fn is fused_loss


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_what_somebody_has_put_in_never_sees_a_packed_batch(part):
    class OwnLayer(DecoderLayer):
        def __call__(self, x, mask, cache=None):
            assert not isinstance(mask, SharedPrompt)
            return super().__call__(x, mask, cache)

    class OwnAttention(Attention):
        def __call__(self, x, mask, cache=None):
            assert not isinstance(mask, SharedPrompt)
            return super().__call__(x, mask, cache)

    base = toy_base()
    if part == "layer":
        base.model.layers[0] = OwnLayer(base.model.config)
    else:
        base.model.layers[0].self_attn = OwnAttention(base.model.config)
    add_lora(base.model, LoRAConfig(rank=4, num_layers=1))
    data = Dataset("alike", rows())
    with pytest.warns(FallbackWarning, match="cannot run on rows that share"):
        trainer = Trainer(base, data, TrainConfig(micro_batch_size=4, epochs=2, shared_prompt=True))
    assert trainer.prefix.used
    assert len(list(trainer)) == 2


def test_a_callers_own_loss_is_left_alone():
    def own(model, batch):
        return supervised_loss(model, batch)

    with pytest.warns(FallbackWarning, match="caller's own"):
        trainer = toy_trainer(data=toy_dataset([9, 12]), loss_fn=own, shared_prompt=True)
    assert trainer.loss_fn is own
