"""Freeze, attach, count, remove."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tests.toy import toy_base, toy_dataset, toy_examples, toy_model
from workbench.data.batches import collate
from workbench.errors import ConfigError
from workbench.probes.parameters import changed, fingerprint
from workbench.tuning.lora import LoRAConfig, add_lora, count_parameters, remove_lora
from workbench.tuning.lora_layers import LoRALinear
from workbench.tuning.losses import supervised_loss
from workbench.tuning.trainer import TrainConfig, Trainer

TOKENS = mx.array([[5, 9, 100, 33, 7]])
SIZES = {  # (in, out) of the toy's projections
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 64),
    "mlp.up_proj": (32, 64),
    "mlp.down_proj": (64, 32),
}


def quantised_model():
    model = toy_model()
    nn.quantize(model, group_size=32, bits=4)
    return model


def trainable_names(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


@pytest.mark.parametrize("build", [toy_model, quantised_model])
def test_fresh_adapter_leaves_logits_unchanged(build):
    model = build()
    before = model(TOKENS)
    add_lora(model, LoRAConfig(rank=4))
    assert mx.array_equal(model(TOKENS), before)


@pytest.mark.parametrize("build", [toy_model, quantised_model])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_exactly_the_factors_train_and_their_count_follows_the_formula(build, rank):
    model = build()
    adapter = add_lora(model, LoRAConfig(rank=rank))
    paths = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in SIZES]
    assert trainable_names(model) == {f"{path}.lora_{x}" for path in paths for x in "ab"}
    assert set(adapter.module_names) == set(paths)
    by_formula = 2 * sum(rank * (in_ + out) for in_, out in SIZES.values())
    assert adapter.trainable == by_formula
    assert adapter.total == by_formula + count_parameters(toy_model())[1]
    assert adapter.percent == pytest.approx(100 * by_formula / adapter.total)
    assert f"{by_formula:,} of" in str(adapter)


def test_the_update_follows_the_formula():
    linear = nn.Linear(6, 4)
    layer = LoRALinear(linear, LoRAConfig(rank=2, alpha=6), mx.random.key(0))
    layer.lora_b = mx.random.normal((2, 4), key=mx.random.key(1))
    x = mx.random.normal((3, 6), key=mx.random.key(2))
    merged = linear.weight + 3.0 * (layer.lora_a @ layer.lora_b).T  # scale = alpha / rank
    assert mx.allclose(layer(x), x @ merged.T + linear.bias, atol=1e-5)


def test_lora_a_starts_within_its_bound_and_differs_between_layers():
    model = toy_model()
    add_lora(model, LoRAConfig(rank=4))
    factors = {n: a for n, a in tree_flatten(model.trainable_parameters()) if n.endswith("lora_a")}
    assert all(mx.abs(a).max().item() <= a.shape[0] ** -0.5 for a in factors.values())
    assert len({fingerprint(model)[name] for name in factors}) == len(factors)


def test_a_layer_starts_alike_whatever_else_is_adapted():
    starts = []
    for targets in ("all-linear", ["q_proj"]):
        model = toy_model()
        add_lora(model, LoRAConfig(rank=4, target_modules=targets, seed=3))
        starts.append(model.layers[1].self_attn.q_proj.lora_a)
    assert mx.array_equal(*starts)


def test_adding_twice_is_adding_once():
    model, twice = toy_model(), toy_model()
    for network, times in ((model, 1), (twice, 2)):
        for _ in range(times):
            adapter = add_lora(network, LoRAConfig(rank=4))
    assert changed(fingerprint(model), fingerprint(twice)) == []
    assert adapter.trainable == count_parameters(model)[0]


def test_adding_another_replaces_the_first():
    model = toy_model()
    add_lora(model, LoRAConfig(rank=4))
    add_lora(model, LoRAConfig(rank=2, target_modules=["v_proj"], num_layers=1))
    assert trainable_names(model) == {f"model.layers.1.self_attn.v_proj.lora_{x}" for x in "ab"}


@pytest.mark.parametrize("build", [toy_model, quantised_model])
def test_removing_restores_every_byte(build):
    model = build()
    before = fingerprint(model)
    add_lora(model)
    assert remove_lora(model) == 14
    assert changed(before, fingerprint(model)) == []
    assert remove_lora(model) == 0


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", set(SIZES)),
        ("q_proj", {"self_attn.q_proj"}),
        (["q_proj", "down_proj"], {"self_attn.q_proj", "mlp.down_proj"}),
        (("self_attn.v_proj",), {"self_attn.v_proj"}),
    ],
)
@pytest.mark.parametrize(("num_layers", "layers"), [(None, {0, 1, 2}), (1, {2}), (2, {1, 2})])
def test_targets_and_the_last_layers_are_chosen(targets, names, num_layers, layers):
    model = toy_model(num_hidden_layers=3)
    adapter = add_lora(model, LoRAConfig(target_modules=targets, num_layers=num_layers))
    expected = {f"model.layers.{layer}.{name}" for layer in layers for name in names}
    assert set(adapter.module_names) == expected


def test_part_of_a_name_is_no_match():
    with pytest.raises(ConfigError, match="match nothing"):
        add_lora(toy_model(), LoRAConfig(target_modules=["proj"]))


FAILURES = {
    "no match": (
        LoRAConfig(target_modules=["q_proj", "k_prj"]),
        r"\['k_prj'\] match nothing.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    ),
    "too many layers": (LoRAConfig(num_layers=3), "num_layers 3 exceeds the model's 2 layers"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_refused_adapter_leaves_the_model_as_it_was(name, adapted):
    model = toy_model()
    if adapted:
        add_lora(model, LoRAConfig(rank=4))
    before, trainable = fingerprint(model), trainable_names(model)
    config, message = FAILURES[name]
    with pytest.raises(ConfigError, match=message):
        add_lora(model, config)
    assert changed(before, fingerprint(model)) == []
    assert trainable_names(model) == trainable


def test_a_model_without_layers_raises():
    with pytest.raises(ConfigError, match="cannot find the layers of a Linear"):
        add_lora(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("rank", value) for value in (0, -1, 2.0, True, "8", 10**12)],
        *[("alpha", value) for value in (0, -1, float("nan"), float("inf"), "16")],
        *[("dropout", value) for value in (1, 1.0, -0.1, float("nan"), "no")],
        *[("num_layers", value) for value in (0, -1, 1.5, True)],
        *[("target_modules", value) for value in ([], "", None, 5)],
        *[("seed", value) for value in (-1, 0.5, 2**64)],
    ],
)
def test_a_bad_setting_raises_and_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        LoRAConfig(**{field: value})


def test_the_largest_seed_is_one():
    assert add_lora(toy_model(), LoRAConfig(seed=2**64 - 1)).trainable > 0


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_takes_on_the_mode_of_its_model(training):
    model = toy_model()
    model.train(training)
    add_lora(model, LoRAConfig(dropout=0.5))
    assert {module.training for _, module in model.named_modules()} == {training}


def test_dropout_touches_the_adapter_only_and_only_in_training():
    model = toy_model()
    model.eval()
    add_lora(model, LoRAConfig(rank=4, dropout=0.5))
    before = model(TOKENS)
    model.train()
    assert mx.array_equal(model(TOKENS), before)  # lora_b is zero: what is dropped adds nothing
    for layer in model.layers:
        layer.mlp.up_proj.lora_b = mx.ones_like(layer.mlp.up_proj.lora_b)
    assert not mx.array_equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert mx.array_equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("quantised", [False, True])
def test_training_moves_the_factors_and_no_frozen_byte(quantised):
    base = toy_base()
    if quantised:
        nn.quantize(base.model, group_size=32, bits=4)
    add_lora(base.model, LoRAConfig(rank=4))
    config = TrainConfig(steps=2, micro_batch_size=8, weight_decay=0.0, schedule="constant")
    trainer = Trainer(base, toy_dataset([12] * 8), config)
    start, factors = fingerprint(base.model), trainable_names(base.model)
    trainer.step()  # lora_a gets no gradient until lora_b has left zero
    lora_b = {name for name in factors if name.endswith("lora_b")}
    assert set(changed(start, fingerprint(base.model))) == lora_b
    trainer.step()
    assert set(changed(start, fingerprint(base.model))) == factors


def test_only_lora_b_has_a_gradient_at_first():
    model, batch = toy_model(), collate(toy_examples([12]), [0])
    add_lora(model, LoRAConfig(rank=4))
    _, gradients = nn.value_and_grad(model, supervised_loss)(model, batch)
    for name, gradient in tree_flatten(gradients):
        assert mx.any(gradient != 0).item() == name.endswith("lora_b"), name
