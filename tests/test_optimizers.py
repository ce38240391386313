"""Every optimizer: MLX's own numbers, learning rates by group, resume, bad settings."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.toy import toy_base, toy_dataset
from workbench.errors import ConfigError
from workbench.probes.parameters import changed, fingerprint
from workbench.tuning.config import OPTIMIZERS, TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.optimizers import GroupedOptimizer, make_optimizer
from workbench.tuning.trainer import Trainer

MLX_OWN = {  # as a person would write them down
    "adamw": lambda: optim.AdamW(0.1, weight_decay=0.01, bias_correction=True),
    "adam": lambda: optim.Adam(0.1, bias_correction=True),
    "sgd": lambda: optim.SGD(0.1, momentum=0.9, weight_decay=0.01),
    "lion": lambda: optim.Lion(0.1, weight_decay=0.01),
    "adafactor": lambda: optim.Adafactor(
        0.1, scale_parameter=False, relative_step=False, weight_decay=0.01
    ),
    "muon": lambda: optim.Muon(0.1, momentum=0.9, weight_decay=0.01),
}


def numbers(seed):
    shapes = {"layers.0.q.lora_a": (6, 3), "layers.0.q.lora_b": (3, 8), "layers.0.k.lora_a": (6, 3)}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    named = [(n, mx.random.normal(s, key=k)) for (n, s), k in zip(shapes.items(), keys)]
    return tree_unflatten(named)


def updated(optimizer, rate=0.1, times=3):
    """Parameters by name after some updates with gradients of their own."""
    parameters = numbers(0)
    optimizer.init(parameters)
    for step in range(times):
        optimizer.learning_rate = rate
        parameters = optimizer.apply_gradients(numbers(step + 1), parameters)
    return dict(tree_flatten(parameters))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_updates_are_those_of_mlx(name):
    expected = updated(MLX_OWN[name]())
    for path, array in updated(make_optimizer(TrainConfig(optimizer=name))).items():
        assert mx.allclose(array, expected[path], rtol=1e-6, atol=1e-7), path


@pytest.mark.parametrize(("name", "theirs"), [("adam", optim.Adam), ("adamw", optim.AdamW)])
def test_without_bias_correction_it_is_mlx_without_it(name, theirs):
    expected = updated(theirs(0.1))
    corrected = updated(make_optimizer(TrainConfig(optimizer=name)))
    config = TrainConfig(optimizer=name, bias_correction=False)
    for path, array in updated(make_optimizer(config)).items():
        assert mx.allclose(array, expected[path], rtol=1e-6, atol=1e-7), path
        assert not mx.allclose(array, corrected[path], rtol=1e-3), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lora_plus_is_a_faster_rate_for_lora_b_alone(name):
    plus = updated(make_optimizer(TrainConfig(optimizer=name, lora_plus_ratio=4.0)))
    slow, fast = (updated(make_optimizer(TrainConfig(optimizer=name)), rate) for rate in (0.1, 0.4))
    for path, array in plus.items():
        expected = fast if path.endswith("lora_b") else slow
        assert mx.allclose(array, expected[path], rtol=1e-6, atol=1e-7), path
        assert not mx.allclose(fast[path], slow[path], rtol=1e-3)


def test_muon_leaves_vectors_and_embeddings_to_adamw():
    optimizer = make_optimizer(TrainConfig(optimizer="muon"))
    parameters = {
        "embed_tokens": {"weight": mx.ones((9, 4))},
        "norm": {"weight": mx.ones((4,))},
        "q_proj": {"weight": mx.ones((4, 4))},
    }
    optimizer.init(parameters)
    muon, adamw = (dict(tree_flatten(each.state)) for each in optimizer.optimizers)
    assert {name for name in muon if name.endswith("weight.v")} == {"q_proj.weight.v"}
    moments = {name for name in adamw if name.endswith(".m")}
    assert moments == {"embed_tokens.weight.m", "norm.weight.m"}


def test_the_rate_of_groups_is_that_of_the_ratio_one():
    optimizer = make_optimizer(TrainConfig(lora_plus_ratio=16.0))
    assert isinstance(optimizer, GroupedOptimizer)
    optimizer.learning_rate = 0.5
    assert optimizer.learning_rate.item() == 0.5
    assert [each.learning_rate.item() for each in optimizer.optimizers] == [8.0, 0.5]


def trained(tmp_path, steps, config):
    base = toy_base()
    add_lora(base.model, LoRAConfig(rank=4, use_dora=True))
    trainer = Trainer(base, toy_dataset([9, 12, 15, 9]), config, run_dir=tmp_path / "run")
    losses = []
    for report in trainer:
        losses.append(report.loss)
        if len(losses) == steps:
            break
    return base.model, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_a_run_learns_and_goes_on_where_it_was(tmp_path, name, ratio):
    rate = {"sgd": 0.05, "lion": 1e-3, "muon": 0.02}.get(name, 5e-3)
    config = TrainConfig(
        steps=8, optimizer=name, learning_rate=rate / ratio, lora_plus_ratio=ratio, schedule="wsd"
    )
    whole, losses = trained(tmp_path / "whole", None, config)
    assert losses[-1] < losses[0]
    trained(tmp_path / "parts", 3, config)
    resumed, rest = trained(tmp_path / "parts", None, config)
    assert rest == losses[3:]
    assert changed(fingerprint(whole), fingerprint(resumed)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adagrad"}, "unknown optimizer 'adagrad'.*muon"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio must be above 0"),
        ({"lora_plus_ratio": "much"}, "lora_plus_ratio must be a number"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"lion_betas": (0.9,)}, "lion_betas must be two numbers"),
        ({"decay_steps": 0}, "decay_steps must be a whole number from 1"),
        ({"warmup_from": -1}, "warmup_from must be a number, finite, from 0"),
        ({"bias_correction": 1}, "bias_correction must be True or False"),
        ({"decay_power": -1}, "decay_power must be a number, finite, from 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
