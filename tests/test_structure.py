"""The list of decoder layers is found by what it is, whatever its name."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from tests.architectures import ARCHITECTURES
from tests.toy import toy_model
from workbench.errors import ConfigError
from workbench.models.structure import find_layers, module_at
from workbench.probes.recording import recorded
from workbench.tuning.lora import LoRAConfig, add_lora

PLACES = {  # where a family does not keep its layers at model.layers
    "backbone.layers": ["mamba", "mamba2", "nemotron_h"],
    "model.blocks": ["talkie"],
    "model.h": ["gpt2", "gpt_neox", "gptj"],
    "model.layers.layers": ["plamo"],
    "transformer.blocks": ["dbrx"],
    "transformer.h": ["qwen", "gpt_bigcode", "nanochat", "exaone"],
    "transformer.layers": ["openelm"],
}
PLACE_OF = {name: path for path, names in PLACES.items() for name in names}


@pytest.fixture(scope="module", autouse=True)
def _without_compilation():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_layers_of_every_architecture_are_found(name):
    model = ARCHITECTURES[name].build()
    path, count = find_layers(model)
    assert path == PLACE_OF.get(name, "model.layers")
    assert count == len(model.layers)
    places = module_at(model, path)
    assert all(a is b for a, b in zip(places, model.layers))  # mlx-lm's own word for them


def test_ours_keeps_them_at_model_layers_adapted_or_not():
    model = toy_model(num_hidden_layers=3)
    assert find_layers(model) == ("model.layers", 3)
    add_lora(model, LoRAConfig(rank=2))
    assert find_layers(model) == ("model.layers", 3)


def test_layers_that_are_listened_to_are_found_all_the_same():
    model = toy_model()
    with recorded(model, ["model.layers.0", "model.layers.1"]):
        assert find_layers(model) == ("model.layers", 2)


def test_the_list_with_the_most_parameters_wins_over_a_longer_one():
    model = nn.Module()
    model.heads = [nn.Linear(4, 4) for _ in range(8)]
    model.core = nn.Module()
    model.core.stack = [nn.Linear(64, 64) for _ in range(2)]
    assert find_layers(model) == ("core.stack", 2)


def test_a_layers_own_list_is_part_of_it():
    model, layer = nn.Module(), nn.Module()
    layer.experts = [nn.Linear(64, 64) for _ in range(4)]
    model.stack = [layer]
    assert find_layers(model) == ("stack", 1)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), SwitchLinear(4, 4, 2)], ids=["a", "b"])
def test_a_network_without_layers_is_named(model):
    with pytest.raises(ConfigError, match=f"layers of a {type(model).__name__}"):
        find_layers(model)
