"""Head and cross-entropy by chunks: the same loss and gradients, and never all logits at once."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.architectures import ARCHITECTURES
from tests.test_losses import moved_lora_model
from tests.toy import TOY_CONFIG, toy_dataset, toy_examples, toy_model
from tests.toy_training import toy_trainer
from workbench.data.batches import collate
from workbench.errors import ConfigError, FallbackWarning
from workbench.models.llama import Llama
from workbench.models.llama_config import LlamaConfig
from workbench.probes.planning.losses import chunk_positions
from workbench.tuning.config import TrainConfig
from workbench.tuning.fused_loss import fused_cross_entropy
from workbench.tuning.lora import LoRAConfig
from workbench.tuning.lora_layers import LoRALinear
from workbench.tuning.losses import (
    SupervisedHeadLoss,
    chosen_loss,
    cross_entropy,
    default_loss,
    fused_loss,
    mean_loss,
    plain_loss,
    supervised_loss,
)
from workbench.tuning.update import accumulate

UNTIED = {"tie_word_embeddings": not TOY_CONFIG["tie_word_embeddings"]}
RAGGED = collate(toy_examples([90, 5, 60, 40, 100, 3]), range(6))  # 286 targets: three chunks
SINGLE = collate(toy_examples([3]), [0])
WIDE = {"vocab_size": 60_000, "hidden_size": 32}


class Capped(Llama):
    """A head that is not linear."""

    def head(self, hidden_states):
        return 3 * mx.tanh(super().head(hidden_states) / 3)


def other_tying():
    return toy_model(**UNTIED)


def capped():
    model = Capped(LlamaConfig.from_dict(TOY_CONFIG))
    model.update(toy_model().parameters())
    return model


def trains_only(*names, **changes):
    def build():
        model = toy_model(**changes)
        model.freeze()
        for name in names:
            getattr(model if name == "lm_head" else model.model, name).unfreeze()
        return model

    build.__name__ = "only " + ", ".join(names)
    return build


def quantised():
    model = moved_lora_model()
    nn.quantize(model, group_size=32, bits=8)
    return model


def adapted_head():
    model = toy_model(tie_word_embeddings=False)
    model.freeze()
    model.lm_head = LoRALinear(model.lm_head, LoRAConfig(rank=3), mx.random.key(1))
    model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape, key=mx.random.key(2))
    model.lm_head.freeze()
    model.lm_head.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return model


BUILDS = [
    toy_model,
    other_tying,
    capped,
    moved_lora_model,
    quantised,
    adapted_head,
    trains_only("norm"),
    trains_only("norm", "embed_tokens", tie_word_embeddings=True),
    trains_only("norm", "lm_head", tie_word_embeddings=False),
]


def value_and_gradients(loss_fn, model, batch, training=True):
    model.train(training)
    loss, gradients = nn.value_and_grad(model, loss_fn)(model, batch)
    mx.eval(loss, gradients)
    return loss.item(), dict(tree_flatten(gradients))


def assert_close(one, other, tolerance=1e-5):
    """Of each tensor's largest number."""
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        largest = mx.abs(gradient).max().item()
        assert mx.abs(one[1][name] - gradient).max().item() <= tolerance * largest + 1e-12, name


@pytest.mark.parametrize("batch", [RAGGED, SINGLE], ids=["ragged", "single"])
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_loss_and_gradients_are_those_of_the_plain_form(build, batch):
    model = build()
    expected = value_and_gradients(supervised_loss, model, batch)
    assert max(mx.abs(gradient).max().item() for gradient in expected[1].values()) > 0
    for training in (True, False, True):
        assert_close(value_and_gradients(fused_loss, model, batch, training), expected)
    assert_close(
        value_and_gradients(fused_loss, model, batch), value_and_gradients(plain_loss, model, batch)
    )


def test_a_chunk_has_the_positions_whose_logits_fit():
    sizes = {2: 1024, 20_000: 384, 49_152: 128, 128_256: 64, 10**7: 64}
    assert {vocab: chunk_positions(vocab) for vocab in sizes} == sizes


@pytest.mark.parametrize("count", [1, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("training", [True, False])
def test_any_number_of_positions(count, training):
    model = toy_model(**WIDE)  # 128 positions a chunk
    hidden_states = mx.random.normal((count, WIDE["hidden_size"]), key=mx.random.key(0))
    targets = mx.random.randint(0, WIDE["vocab_size"], (count,), key=mx.random.key(1))

    def fused(model, x):
        return fused_cross_entropy(model, x, targets)

    def plain(model, x):
        return cross_entropy(model.head(x), targets).sum()

    model.train(training)
    found, expected = (
        mx.value_and_grad(f, argnums=1)(model, hidden_states) for f in (fused, plain)
    )
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found[1].shape == hidden_states.shape
    largest = mx.abs(expected[1]).max().item()
    assert np.allclose(found[1], expected[1], rtol=1e-4, atol=1e-5 * largest)


def test_a_batch_without_targets_is_zero():
    model, batch = toy_model(), collate(toy_examples([5, 6]), [0, 1])
    batch.loss_mask[:] = False
    for training in (True, False):
        loss, gradients = value_and_gradients(fused_loss, model, batch, training)
        assert loss == 0
        assert all(mx.abs(gradient).max().item() == 0 for gradient in gradients.values())


def test_what_follows_the_loss_reaches_the_gradients():
    def followed(loss_fn):
        def loss(model, batch):
            return 3 * loss_fn(model, batch) + mx.square(model.model.norm.weight).sum()

        return loss

    model = toy_model()
    found, expected = (
        value_and_gradients(followed(form), model, RAGGED) for form in (fused_loss, supervised_loss)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_no_further_off_than_the_plain_form(dtype):
    model = toy_model()
    exact = value_and_gradients(plain_loss, model, RAGGED)
    model.set_dtype(dtype)
    found = value_and_gradients(fused_loss, model, RAGGED)
    plain = value_and_gradients(supervised_loss, model, RAGGED)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)  # a float32 sum in both
    for name, gradient in exact[1].items():
        errors = [mx.linalg.norm((form[1][name] - gradient).flatten()) for form in (found, plain)]
        assert found[1][name].dtype == dtype
        assert errors[0].item() <= 1.5 * errors[1].item() + 1e-6, name


def test_dropout_and_checkpointed_layers_go_with_it():
    model = moved_lora_model(dropout=0.5)
    expected, wanted = accumulate(model, supervised_loss, [RAGGED], 3)
    found, gradients = accumulate(model, fused_loss, [RAGGED], 3, grad_checkpoint=True)
    assert_close(
        (found.item(), dict(tree_flatten(gradients))), (expected.item(), dict(tree_flatten(wanted)))
    )


def peak(model, loss_fn, rows, gradients=True):
    """Bytes beyond what was there, for rows of 128 targets."""
    batch = collate(toy_examples([129] * rows, prompt=1), range(rows))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if gradients:
        value_and_gradients(loss_fn, model, batch)
    else:
        model.eval()
        mx.eval(loss_fn(model, batch))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("gradients", [True, False])
def test_peak_memory_is_lower_and_hardly_grows_with_the_positions(gradients):
    model = toy_model(**WIDE)
    model.freeze()
    model.layers[0].unfreeze()
    whole = 128 * WIDE["vocab_size"] * 4  # bytes of one chunk's logits
    fused, plain = (peak(model, form, 16, gradients) for form in (fused_loss, supervised_loss))
    assert plain > 16 * whole
    assert fused < 0.5 * plain
    assert fused - peak(model, fused_loss, 8, gradients) < 2 * whole  # 8 chunks do not run ahead


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = adapted_head()
    model.train(training)
    before = dict(tree_flatten(model.parameters()))
    mx.eval(fused_loss(model, RAGGED))
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_validation_is_the_plain_forms():
    model, examples = toy_model(), toy_examples([90, 80, 30])
    found = mean_loss(model, examples, 3, fused_loss)
    assert found == pytest.approx(mean_loss(model, examples, 3), rel=1e-6)


def test_a_model_without_two_parts_falls_back_and_says_so():
    model = ARCHITECTURES["gemma2"].build()
    with pytest.warns(FallbackWarning, match="does not part into backbone and head"):
        assert isinstance(default_loss(model, fused=True), SupervisedHeadLoss)


def test_a_custom_loss_is_used_as_it_is_and_that_is_said():
    def own_loss(model, batch):
        return 2 * supervised_loss(model, batch)

    with pytest.warns(FallbackWarning, match="own_loss"):
        trainer = toy_trainer(loss_fn=own_loss, fused_loss=True)
    assert trainer.loss_fn is own_loss
    assert chosen_loss(trainer.model, own_loss, fused=False) is own_loss


def test_a_trainer_makes_the_same_steps():
    plain, fused = (
        toy_trainer(data=toy_dataset([70, 80, 60, 50], [30, 40]), epochs=4, fused_loss=on)
        for on in (False, True)
    )
    assert [t.loss_fn.loss_fn for t in (plain, fused)] == [supervised_loss, fused_loss]
    for one, other in zip(plain, fused, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
    assert fused.reports[-1].valid_loss == pytest.approx(plain.reports[-1].valid_loss, rel=1e-4)


@pytest.mark.parametrize("name", ["grad_checkpoint", "fused_loss", "shared_prompt"])
@pytest.mark.parametrize("value", [1, "yes"])
def test_the_switches_are_truth_values(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{name: value})
