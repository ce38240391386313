"""One adapted layer: LoRA, rsLoRA and DoRA against mlx-lm's, and as one plain weight."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner import dora as reference_dora
from mlx_lm.tuner import lora as reference_lora

from tests.toy import toy_base, toy_dataset, toy_model
from workbench.data.batches import collate
from workbench.tuning.lora import LoRAConfig, adapter_disabled, add_lora
from workbench.tuning.lora_layers import DoRALinear, LoRALinear, plain_weight
from workbench.tuning.losses import supervised_loss
from workbench.tuning.trainer import TrainConfig, Trainer

CONFIG = LoRAConfig(rank=3, alpha=6)
REFERENCES = {LoRALinear: reference_lora.LoRALinear, DoRALinear: reference_dora.DoRALinear}
KINDS = list(REFERENCES)
TOKENS = mx.array([[5, 9, 100, 33, 7]])


def plain(bias=True):
    return nn.Linear(64, 8, bias=bias)


def quantised(bias=True):
    return nn.QuantizedLinear.from_linear(plain(bias), group_size=32, bits=4)


@pytest.fixture(params=[plain, quantised], ids=["plain", "quantised"])
def linear(request):
    mx.random.seed(1)
    return request.param()


def quantised_toy():
    model = toy_model()
    nn.quantize(model, group_size=32, bits=4)
    return model


def trained(kind, linear, config=CONFIG, seed=0):
    """A layer whose adapter has left its start."""
    layer = kind(linear, config, mx.random.key(seed))
    for number, name in enumerate(layer.parts, 1):
        noise = mx.random.normal(layer[name].shape, key=mx.random.key(seed + number))
        layer[name] = layer[name] + 0.3 * noise
    return layer


def numbers(shape=(5, 64), seed=9):
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_mlx_lm(kind, linear):
    ours = trained(kind, linear)
    theirs = REFERENCES[kind].from_base(linear, r=3, dropout=0.0, scale=CONFIG.scale)
    for layer in (ours, theirs):
        layer.freeze()
        layer.unfreeze(keys=list(kind.parts), recurse=False)
        layer.update({name: ours[name] for name in kind.parts})
    assert mx.allclose(ours(numbers()), theirs(numbers()), rtol=1e-5, atol=1e-5)

    def slopes(layer):
        found = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())(numbers())[1]
        return dict(tree_flatten(found))

    expected = slopes(theirs)
    assert set(expected) == set(kind.parts)
    for name, slope in slopes(ours).items():
        assert mx.allclose(slope, expected[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_one_plain_weight_does_the_same(kind, linear):
    layer, merged = trained(kind, linear), nn.Linear(64, 8)
    merged.weight, merged.bias = layer.fused_weight(), linear.bias
    assert merged.weight.dtype == mx.float32
    assert mx.allclose(layer(numbers()), merged(numbers()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_zero_is_the_base_to_the_bit(kind, linear):
    layer = trained(kind, linear)
    layer.scale = 0.0
    assert mx.array_equal(layer(numbers()), linear(numbers()))
    assert mx.allclose(layer.fused_weight(), plain_weight(linear))


def test_lengths_are_those_of_the_whole_matrix(linear):
    layer = trained(DoRALinear, linear)
    whole = plain_weight(linear) + layer.scale * (layer.lora_a @ layer.lora_b).T
    assert mx.allclose(layer._lengths(), mx.linalg.norm(whole, axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "lora_a", "lora_b", "scale"])
def test_lengths_that_are_kept_follow_what_is_replaced(name):
    layer = trained(DoRALinear, plain())
    layer.eval()
    before = layer(numbers())
    assert layer._lengths() is layer._lengths()  # kept
    if name == "linear":
        layer.linear.weight = 2 * layer.linear.weight
    else:
        setattr(layer, name, 2 * getattr(layer, name))
    assert not mx.allclose(layer(numbers()), before, rtol=1e-3)
    kept = layer(numbers())
    layer.train()  # makes them anew
    assert mx.allclose(layer(numbers()), kept, rtol=1e-6)


@pytest.mark.parametrize("build", [toy_model, quantised_toy])
def test_a_fresh_dora_leaves_logits_unchanged(build):
    model = build()
    before = model(TOKENS)
    adapter = add_lora(model, LoRAConfig(rank=4, use_dora=True))
    assert mx.allclose(model(TOKENS), before, rtol=1e-6, atol=1e-5)
    names = {name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"lora_a", "lora_b", "m"}
    assert str(adapter).startswith("DoRA rank 4")


def test_a_row_of_zeros_stays_finite_as_dora(linear):
    linear.weight = mx.concatenate([mx.zeros_like(linear.weight[:1]), linear.weight[1:]])
    if "scales" in linear:
        linear.scales, linear.biases = (mx.zeros_like(a) for a in (linear.scales, linear.biases))
    layer = DoRALinear(linear, CONFIG, mx.random.key(0))
    assert mx.allclose(layer(numbers()), linear(numbers()), atol=1e-5)
    layer.lora_b = layer.lora_b + 0.3
    assert mx.isfinite(layer(numbers())).all()
    assert mx.isfinite(layer.fused_weight()).all()


def test_rslora_scales_by_the_root_of_the_rank():
    config = LoRAConfig(rank=16, alpha=8, use_rslora=True)
    assert config.scale == 2.0
    assert dataclasses.replace(config, use_rslora=False).scale == 0.5
    assert config.kind == "rsLoRA"


def test_dora_trains_and_can_be_switched_off():
    base = toy_base()
    before = base.model(TOKENS)
    add_lora(base.model, LoRAConfig(rank=4, use_dora=True))
    lengths = base.model.layers[0].self_attn.q_proj.m
    data = toy_dataset([12, 12, 12])
    start = supervised_loss(base.model, collate(data.train, [0, 1, 2])).item()
    reports = list(Trainer(base, data, TrainConfig(steps=6, learning_rate=1e-2)))
    assert reports[-1].loss < 0.9 * start / reports[0].num_tokens
    assert not mx.array_equal(base.model.layers[0].self_attn.q_proj.m, lengths)
    with adapter_disabled(base.model):
        assert mx.array_equal(base.model(TOKENS), before)


def test_a_row_is_as_long_as_m_says():
    layer = trained(DoRALinear, plain())
    assert mx.allclose(mx.linalg.norm(layer.fused_weight(), axis=1), mx.abs(layer.m), rtol=1e-5)
