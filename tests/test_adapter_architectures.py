"""Adapters on mlx-lm's architectures, whose layers need not be alike: saved, and loaded again."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

import workbench as wb
from tests.architectures import ARCHITECTURES
from tests.test_fuse_architectures import foreign
from tests.toy_adapters import same
from tests.toy_architectures import small_base
from workbench.errors import ConfigError, WeightsError
from workbench.export.adapters import adapter_weights, load_adapter, save_adapter
from workbench.models.files import read_json, weight_files
from workbench.models.safetensors_header import read_header
from workbench.probes.parameters import changed, fingerprint
from workbench.tuning.lora import remove_lora

TOKENS = mx.array([[5, 9, 60, 33, 7, 64, 20]])
UNEVEN = [
    "gemma4_text",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "recurrent_gemma",
    "rwkv7",
    "qwen3_next",
    "lfm2",
    "jamba",
    "nemotron_h",
]


@pytest.fixture(scope="module", autouse=True)
def _without_compilation():
    # mlx-lm compiles small functions, which takes seconds the first time on a CPU.
    mx.disable_compile()
    yield
    mx.enable_compile()


def move(base):
    """An adapter that has trained a little."""
    base.model.update(tree_map(lambda a: a + 0.02, base.model.trainable_parameters()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_round_trip_gives_equal_logits_here_and_in_mlx_lm(tmp_path, name):
    base, fresh, twin = (small_base(name) for _ in range(3))
    plain = base.model(TOKENS)
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    move(base)
    expected = base.model(TOKENS)
    assert mx.abs(expected - plain).max() > 1e-3
    save_adapter(base, tmp_path)
    load_adapter(fresh, tmp_path)
    assert same(adapter_weights(fresh.model), adapter_weights(base.model))
    assert mx.array_equal(fresh.model(TOKENS), expected)
    theirs = load_adapters(twin.model, str(tmp_path))
    assert mx.abs(theirs(TOKENS) - expected).max() <= 1e-4 * mx.abs(expected).max()


@pytest.mark.parametrize("name", UNEVEN)
def test_peft_adapts_the_same_modules_of_layers_that_are_not_alike(tmp_path, name):
    wb.fuse(foreign(ARCHITECTURES[name], tmp_path / "nowhere"), tmp_path / "model")
    base = wb.load_model(tmp_path / "model")
    adapter = wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    move(base)
    save_adapter(base, tmp_path / "adapter", format="peft")
    targets = read_json(tmp_path / "adapter/adapter_config.json")["target_modules"]
    named = [n for path in weight_files(tmp_path / "model") for n in read_header(path)]
    paths = [n.removesuffix(".weight") for n in named if n.endswith(".weight")]
    ends = tuple(f".{target}" for target in targets)  # as PEFT matches them
    assert {path for path in paths if path.endswith(ends)} == set(adapter.module_names)
    fresh = wb.load_model(tmp_path / "model")
    load_adapter(fresh, tmp_path / "adapter")
    assert same(adapter_weights(fresh.model), adapter_weights(base.model))


def test_what_peft_would_adapt_beside_is_refused(tmp_path):
    wb.fuse(foreign(ARCHITECTURES["qwen3"], tmp_path / "nowhere"), tmp_path / "model")
    base = wb.load_model(tmp_path / "model")
    layer = base.model.layers[1].mlp
    layer.other = layer.pop("up_proj")  # in the files, layer 1 has an up_proj
    wb.add_lora(base.model, wb.LoRAConfig(rank=2, target_modules=["up_proj"]))
    with pytest.raises(ConfigError, match=r"PEFT would adapt model\.layers\.1\.mlp\.up_proj"):
        save_adapter(base, tmp_path / "adapter", format="peft")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("keys", [None, "experts"])
def test_mlx_lms_adapter_on_stacked_experts_is_refused_as_that(tmp_path, name, keys):
    base, twin = small_base(name), small_base(name).model
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    if keys == "experts":
        stacked = wb.add_lora(base.model).expert_names
        remove_lora(base.model)
        parameters["keys"] = sorted({path.split(".", 3)[3] for path in stacked})
    twin.freeze()
    linear_to_lora_layers(twin, -1, dict(parameters))
    weights = dict(tree_flatten(twin.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = fingerprint(base.model)
    with pytest.raises(WeightsError, match=r"switch_mlp\.\w+\.lora_a and \d+ more .*experts"):
        load_adapter(base, tmp_path)
    assert changed(before, fingerprint(base.model)) == []


def test_a_layer_without_such_a_module_is_passed_over_and_one_with_it_is_not(tmp_path):
    base = small_base("lfm2")  # one layer of two has attention
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    layer = base.model.layers[1].feed_forward
    layer.w1 = layer.w1.linear
    with pytest.raises(ConfigError, match=r"layer 1 has feed_forward\.w1 without an adapter"):
        save_adapter(base, tmp_path / "adapter")


def test_a_name_that_is_no_linear_layer_elsewhere_is_refused(tmp_path):
    base = small_base("qwen3")
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    base.model.layers[1].mlp.up_proj = nn.Identity()  # mlx-lm would stop at it
    with pytest.raises(ConfigError, match=r"layer 1 has mlp\.up_proj without an adapter"):
        save_adapter(base, tmp_path / "adapter")
