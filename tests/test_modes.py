"""Head only, full, frozen: what trains, what moves, what is refused; quantised bases."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tests.architectures import ARCHITECTURES
from tests.toy import save_toy_folder, toy_base, toy_dataset, toy_examples, toy_model
from workbench.data.batches import collate
from workbench.errors import ConfigError, TrainingError
from workbench.models.loading import load_model
from workbench.probes.parameters import changed, fingerprint
from workbench.probes.training import check_training
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import supervised_loss
from workbench.tuning.modes import set_trainable, untie_head
from workbench.tuning.trainer import Trainer

TOKENS = mx.array([[5, 9, 100, 33, 7]])
HEAD = {"model.norm.weight", "lm_head.weight"}


def names(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def run(base, **settings):
    config = TrainConfig(steps=4, learning_rate=1e-2, **settings)
    return [report.loss for report in Trainer(base, toy_dataset([9, 12, 15]), config)]


def test_the_head_of_an_untied_model_trains_and_nothing_else_moves():
    base = toy_base(tie_word_embeddings=False)
    before = fingerprint(base.model)
    trained = set_trainable(base.model, "head")
    assert set(trained.names) == HEAD == names(base.model)
    assert trained.trainable == 32 + 32 * 259
    losses = run(base)
    assert losses[-1] < losses[0]
    assert set(changed(before, fingerprint(base.model))) == HEAD


def test_a_tied_head_is_untied_first():
    base = toy_base()
    before, logits = fingerprint(base.model), base.model(TOKENS)
    with pytest.raises(ConfigError, match=r"the head is the embedding.*untie_head"):
        set_trainable(base.model, "head")
    for _ in range(2):  # a cell can run twice
        untie_head(base)
    assert mx.array_equal(base.model(TOKENS), logits)
    assert base.config.tie_word_embeddings is base.raw_config["tie_word_embeddings"] is False
    set_trainable(base.model, "head")
    run(base)
    after = fingerprint(base.model)
    assert "model.embed_tokens.weight" in before
    assert [name for name in before if before[name] != after[name]] == ["model.norm.weight"]


def test_everything_trains_and_moves():
    base = toy_base()
    before = fingerprint(base.model)
    trained = set_trainable(base.model, "full")
    assert set(trained.names) == set(before)
    assert trained.percent == 100
    losses = run(base)
    assert losses[-1] < losses[0]
    assert set(changed(before, fingerprint(base.model))) == set(before)


def test_nothing_trains_when_frozen_and_an_adapter_stays():
    base = toy_base()
    add_lora(base.model)
    assert set_trainable(base.model, "frozen").trainable == 0
    assert any(name.endswith("lora_a") for name in fingerprint(base.model))
    with pytest.raises(TrainingError, match="nothing is trainable"):
        run(base)


@pytest.mark.parametrize("mode", ["head", "full"])
def test_an_adapter_is_removed(mode):
    base = toy_base(tie_word_embeddings=False)
    plain = base.model(TOKENS)
    add_lora(base.model, LoRAConfig(use_dora=True))
    set_trainable(base.model, mode)
    assert mx.array_equal(base.model(TOKENS), plain)
    assert not any("lora" in name for name in names(base.model))


@pytest.mark.parametrize("mode", ["head", "full", "lora"])
def test_quantised_weights_are_refused_and_nothing_is_changed(mode):
    model = toy_model(tie_word_embeddings=False)
    nn.quantize(model, group_size=32, bits=4)
    add_lora(model)
    before = names(model)
    with pytest.raises(ConfigError, match="quantised" if mode != "lora" else "unknown mode 'lora'"):
        set_trainable(model, mode)
    assert names(model) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt_neox", {"model.final_layer_norm", "model.embed_out"}),
        ("mixtral", {"model.norm", "lm_head"}),
        ("mamba2", {"backbone.norm_f", "lm_head"}),
    ],
)
def test_the_head_of_other_architectures_is_what_runs_after_the_layers(name, expected):
    settings = {"tie_word_embeddings": False}
    architecture = ARCHITECTURES[name]
    given = {**architecture.settings, **settings}
    model = dataclasses.replace(architecture, settings=given).build()
    trained = set_trainable(model, "head")
    assert {name.rpartition(".")[0] for name in trained.names} == expected


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "mamba2", "mixtral"])
def test_full_trains_every_parameter_of_other_architectures(name):
    model = ARCHITECTURES[name].build()
    floats = {n for n, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)}
    assert set(set_trainable(model, "full").names) == floats


@pytest.mark.parametrize("mode", ["LoRA", "rsLoRA", "DoRA", "rsDoRA", "QLoRA", "head", "full"])
def test_the_checks_of_isolation_pass_and_the_count_follows_the_formula(mode):
    base = toy_base(tie_word_embeddings=False)
    sizes = {path: m.weight.shape for path, m in base.model.named_modules() if "proj" in path}
    if mode == "QLoRA":
        nn.quantize(base.model, group_size=32, bits=4)
    if mode in ("head", "full"):
        trained = set_trainable(base.model, mode)
        expected = trained.trainable
    else:
        dora = mode.endswith("DoRA")
        config = LoRAConfig(rank=4, use_dora=dora, use_rslora=mode.startswith("rs"))
        trained = add_lora(base.model, config)
        expected = sum(4 * (out + in_) + dora * out for out, in_ in sizes.values())
    assert trained.trainable == expected
    batch = collate(toy_examples([9, 12, 15]), [0, 1, 2])
    kind = mode if mode in ("head", "full") else "lora"
    report = check_training(base.model, supervised_loss, batch, mode=kind)
    assert report.ok, report


@pytest.fixture
def folder(tmp_path):
    return save_toy_folder(tmp_path / "toy", hidden_size=64, tie_word_embeddings=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_on_a_base_that_is_quantised_on_load(folder, bits):
    base = load_model(folder, quantise={"bits": bits, "group_size": 32})
    plain = load_model(folder)
    layers = [m for m in base.model.modules() if isinstance(m, nn.QuantizedLinear)]
    assert {layer.bits for layer in layers} == {bits}
    assert len(layers) == 2 * 7 + 1
    assert f"16 layers quantised to {bits} bits by 32" in str(base.report)
    apart = mx.abs(base.model(TOKENS) - plain.model(TOKENS)).max()
    assert 0 < (apart / mx.abs(plain.model(TOKENS)).max()).item() < (0.6 if bits == 4 else 0.05)
    adapter = add_lora(base.model, LoRAConfig(rank=4))
    assert adapter.total - adapter.trainable == sum(
        array.size for _, array in tree_flatten(plain.model.parameters())
    )
    before = fingerprint(base.model)
    losses = run(base)
    assert losses[-1] < losses[0]
    assert all(".lora_" in name for name in changed(before, fingerprint(base.model)))


def test_gradients_through_a_quantised_base_are_those_through_its_numbers(folder):
    base = load_model(folder, quantise={"bits": 8, "group_size": 32})
    plain = load_model(folder)
    for path, module in base.model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weight = mx.dequantize(module.weight, module.scales, module.biases, 32, 8)
            plain.model.load_weights([(f"{path}.weight", weight)], strict=False)
    slopes = []
    for network in (base.model, plain.model):
        add_lora(network, LoRAConfig(rank=4))

        def loss(network=network):
            return mx.logsumexp(network(TOKENS), axis=-1).sum()

        slopes.append(dict(tree_flatten(nn.value_and_grad(network, loss)()[1])))
    for name, slope in slopes[0].items():
        assert mx.allclose(slope, slopes[1][name], rtol=1e-3, atol=1e-4), name


def test_a_quantised_base_is_reloaded_as_it_was(folder, tmp_path):
    base = load_model(folder, quantise={"bits": 4, "group_size": 32})
    add_lora(base.model, LoRAConfig(rank=4))
    config = TrainConfig(steps=4, reload_every=2)
    reports = list(Trainer(base, toy_dataset([9, 12]), config, run_dir=tmp_path / "run"))
    again = load_model(folder, quantise={"bits": 4, "group_size": 32})
    add_lora(again.model, LoRAConfig(rank=4))
    expected = list(Trainer(again, toy_dataset([9, 12]), TrainConfig(steps=4)))
    assert [r.loss for r in reports] == [r.loss for r in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (True, "nothing quantised"),
        (False, "such as"),
        ({"bits": 7}, "7"),
        ({"bits": 4, "group_size": 31}, "31"),
        ({"bits": 4, "groups": 32}, "groups"),
        ("4bit", "4bit"),
        ({"bits": 4, "group_size": 128}, "no layer's rows divide into groups of 128"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    folder = save_toy_folder(tmp_path / "toy")
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        load_model(folder, quantise=settings)
