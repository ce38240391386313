"""Logits at the supervised positions alone, for any network whose head can be found."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.architectures import ARCHITECTURES
from tests.toy import toy_examples, toy_model
from tests.toy_architectures import small, small_rows
from workbench.data.batches import collate
from workbench.errors import ConfigError, FallbackWarning
from workbench.models.heads import Head, find_head, logits_at
from workbench.probes.parameters import fingerprint
from workbench.probes.training import check_training
from workbench.tuning.lora import LoRAConfig
from workbench.tuning.lora_layers import LoRALinear
from workbench.tuning.losses import SupervisedHeadLoss, default_loss, mean_loss, plain_loss
from workbench.tuning.update import accumulate

BATCH = collate(small_rows([7, 12, 3, 9]), range(4))
BATCH.loss_mask[0, 4] = BATCH.loss_mask[1, 6:9] = False
FALLS_BACK = {"talkie": "no module outside the layers makes the logits"}  # its head is an array
HEADS = {"gpt2": "model.wte", "gpt_neox": "model.embed_out", "internlm2": "output"}
HEADS |= {"llama4_text": "output", "openelm": "transformer.token_embeddings"}
HEADS |= {"gpt_bigcode": "lm_head"}


@pytest.fixture(scope="module", autouse=True)
def _without_compilation():
    mx.disable_compile()
    yield
    mx.enable_compile()


def loss_and_gradients(model: nn.Module, loss_fn) -> tuple[float, dict[str, np.ndarray]]:
    loss, gradients = accumulate(model, loss_fn, [BATCH], seed=3)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


def assert_as_plain(model: nn.Module, loss_fn, bound: float = 1e-4) -> None:
    (loss, gradients), (plain, wanted) = (
        loss_and_gradients(model, each) for each in (loss_fn, plain_loss)
    )
    assert loss == pytest.approx(plain, rel=bound)
    assert gradients.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert np.abs(gradients[name] - gradient).max() <= bound * (
            np.abs(gradient).max() + 1e-3 * largest
        ), name


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FALLS_BACK])
def test_loss_and_gradients_are_the_plain_ones(name):
    model = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn = default_loss(model)
    assert isinstance(loss_fn, SupervisedHeadLoss)
    tied = "tied" in ARCHITECTURES[name].traits
    usual = "model.embed_tokens" if tied else "lm_head"
    assert loss_fn.head.path == HEADS.get(name, usual)
    assert_as_plain(model, loss_fn)


@pytest.mark.parametrize("name", FALLS_BACK)
def test_others_fall_back_and_say_why(name):
    model = small(name)
    with pytest.warns(FallbackWarning, match=FALLS_BACK[name]):
        assert default_loss(model) is plain_loss


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mamba2"])
def test_the_head_projects_the_supervised_positions_only(name):
    model, shapes = small(name), []
    loss_fn = default_loss(model)

    class Listening(type(model.model.embed_tokens) if name == "gemma2" else nn.Linear):
        def __call__(self, x):
            shapes.append(x.shape)
            return super().__call__(x)

        def as_linear(self, x):
            shapes.append(x.shape)
            return super().as_linear(x)

    place = model.model if name == "gemma2" else model
    head = place.embed_tokens if name == "gemma2" else place.lm_head
    head.__class__ = Listening
    loss_fn(model, BATCH)
    assert shapes[-1] == (1, BATCH.num_tokens, 32)


def with_lora_head(model: nn.Module) -> None:
    model.lm_head = LoRALinear(model.lm_head, LoRAConfig(rank=2), mx.random.key(1))
    model.lm_head.lora_b = 0.1 * mx.random.normal(model.lm_head.lora_b.shape, key=mx.random.key(2))


def quantised(model: nn.Module) -> None:
    nn.quantize(model, group_size=32, bits=8)
    model.freeze()
    for layer in model.layers:
        layer.input_layernorm.unfreeze()


@pytest.mark.parametrize(
    ("change", "name"), [(with_lora_head, "qwen3"), (quantised, "qwen3"), (quantised, "qwen2")]
)
def test_an_adapted_and_a_quantised_head_are_heads_too(change, name):
    model = small(name)
    change(model)
    assert_as_plain(model, default_loss(model))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_does_not_hide_the_head(dtype):
    model = small("gemma2")
    model.set_dtype(dtype)
    assert find_head(model) == Head("model.embed_tokens", True)


class Mixing(nn.Module):
    """A head whose logits depend on the position before."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x + 0.1 * mx.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)]))


def test_what_comes_before_a_projection_may_mix_positions():
    model = small("qwen3")
    model.lm_head = Mixing(model.lm_head)
    loss_fn = default_loss(model)
    assert loss_fn.head.path == "lm_head.linear"  # not the whole
    assert_as_plain(model, loss_fn)


class Averaging(nn.Linear):
    """A head that sees all the positions of a row at once."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x + 0.1 * x.mean(axis=1, keepdims=True))


def test_a_head_that_mixes_positions_is_refused_by_name():
    model = small("qwen3")
    model.lm_head.__class__ = Averaging
    with pytest.warns(FallbackWarning, match=r"lm_head gives logits that differ by \S+ of the"):
        assert default_loss(model) is plain_loss


class Wrapped(nn.Module):
    """A network that returns something else around its logits."""

    def __init__(self, inner: nn.Module, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def __call__(self, tokens):
        return self.wrap(self.inner(tokens))


def test_a_network_that_returns_a_tuple_has_a_head():
    model = Wrapped(small("qwen3"), lambda logits: (logits, "cache"))
    assert_as_plain(model, default_loss(model))


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x}, lambda x: x[:, -1], lambda x: x / None])
def test_a_network_without_logits_is_refused_with_the_reason(wrap):
    with pytest.raises(ConfigError, match="cannot be tried"):
        find_head(Wrapped(small("qwen3"), wrap))


def test_looking_for_the_head_changes_nothing():
    model = small("deepseek_v3")
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before, modules = fingerprint(model), dict(model.named_modules())
    mx.random.seed(7)
    key = np.array(mx.random.state[0])
    find_head(model)
    assert [module.training for module in model.modules()] == modes
    assert fingerprint(model) == before
    assert all(module is modules[path] for path, module in model.named_modules())
    assert np.array_equal(mx.random.state[0], key)


def test_a_network_that_draws_leaves_the_random_stream_as_it_was():
    def wrap(logits):
        return logits + 0 * mx.random.normal(logits.shape)

    model = Wrapped(small("qwen3"), wrap)
    mx.random.seed(7)
    key = np.array(mx.random.state[0])
    find_head(model)
    assert np.array_equal(mx.random.state[0], key)


def test_the_head_comes_back_when_the_network_fails():
    model = small("qwen3")
    head, first = model.lm_head, model.layers[0]
    model.layers[0].mlp = None
    with pytest.raises(TypeError):
        logits_at(model, Head("lm_head", False), BATCH.tokens, np.array([1]))
    assert model.lm_head is head
    assert model.layers[0] is first


def test_a_batch_without_targets_has_no_loss():
    model = small("gemma2")
    empty = collate(toy_examples([5, 4], prompt=9), [0, 1])
    empty.tokens[:] %= 90
    assert default_loss(model)(model, empty).item() == 0


def test_validation_says_the_same():
    model, rows = small("gemma2"), small_rows([9, 5, 12])
    assert mean_loss(model, rows, 2) == pytest.approx(mean_loss(model, rows, 2, plain_loss), 1e-5)


def test_another_model_runs_whole_so_that_a_check_can_look_inside():
    model, other = small("qwen3"), toy_model()
    loss_fn = default_loss(model)
    assert loss_fn(other, BATCH).item() == plain_loss(other, BATCH).item()
    report = check_training(model, loss_fn, BATCH)
    assert report.ok, report


def test_gradients_come_with_checkpointed_layers_too():
    model = small("gpt2")
    loss_fn = default_loss(model)
    plain = accumulate(model, loss_fn, [BATCH], 0)
    again = accumulate(model, loss_fn, [BATCH], 0, grad_checkpoint=True)
    assert again[0].item() == plain[0].item()
    for (name, one), (_, other) in zip(tree_flatten(again[1]), tree_flatten(plain[1])):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5), name
