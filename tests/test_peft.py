"""PEFT's layout without PEFT: what is written, and what is refused by name."""

import dataclasses
import json
import math

import mlx.core as mx
import pytest
from mlx.utils import tree_map

import workbench as wb
from tests.toy import toy_base
from tests.toy_adapters import CONFIG, TOKENS, adapted, same
from workbench.errors import AdapterWarning, ConfigError, FileFormatError, WeightsError
from workbench.export.adapters import adapter_weights, load_adapter, save_adapter
from workbench.models.files import read_json, read_safetensors, write_safetensors
from workbench.probes.parameters import changed, fingerprint

DORA = dataclasses.replace(CONFIG, use_dora=True)
RSLORA = dataclasses.replace(CONFIG, use_rslora=True)
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture
def folder(tmp_path):
    """An adapter in PEFT's layout."""
    return save_adapter(adapted(), tmp_path / "adapter", format="peft")


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))


def refused(folder, kind, match, base=None):
    """Loading raises and leaves the model, with the adapter that it had, as it was."""
    base = base or adapted(wb.LoRAConfig(rank=5), seed=7)
    before = fingerprint(base.model)
    with pytest.raises(kind, match=match):
        load_adapter(base, folder)
    assert changed(before, fingerprint(base.model)) == []


@pytest.mark.parametrize("config", [CONFIG, DORA, RSLORA], ids=["lora", "dora", "rslora"])
def test_a_round_trip_gives_every_number_back(tmp_path, config):
    base, fresh = adapted(config), toy_base()
    fresh.model.eval()
    save_adapter(base, tmp_path, format="peft")
    adapter = load_adapter(fresh, tmp_path)
    assert same(adapter_weights(fresh.model), adapter_weights(base.model))
    assert adapter.config.scale == pytest.approx(config.scale, rel=1e-12)
    assert adapter.config.use_dora == config.use_dora
    assert mx.allclose(fresh.model(TOKENS), base.model(TOKENS), rtol=1e-6, atol=1e-6)


def test_names_shapes_and_settings_are_pefts(folder):
    weights = read_safetensors(folder / "adapter_model.safetensors")
    assert len(weights) == 8
    assert weights[f"{PREFIX}lora_A.weight"].shape == (3, 32)
    assert weights[f"{PREFIX}lora_B.weight"].shape == (32, 3)
    config = read_json(folder / "adapter_config.json")
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 10}
    assert expected.items() <= config.items()
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["layers_to_transform"] is None


def test_16_bit_numbers_are_computed_with_in_float32(folder):
    path = folder / "adapter_model.safetensors"
    halves = {name: array.astype(mx.bfloat16) for name, array in read_safetensors(path).items()}
    write_safetensors(path, halves)
    base = toy_base()
    load_adapter(base, folder)
    assert {array.dtype for array in adapter_weights(base.model).values()} == {mx.float32}


REFUSED = [
    ("peft_type", "LOHA"),
    ("peft_type", None),
    ("peft_type", ["LORA"]),
    ("task_type", "SEQ_CLS"),
    ("bias", "all"),
    ("lora_bias", True),
    ("modules_to_save", ["lm_head"]),
    ("fan_in_fan_out", True),
    ("rank_pattern", {"q_proj": 2}),
    ("rank_pattern", [3]),
    ("alpha_pattern", {"up_proj": 1.5}),
    ("layers_pattern", ["h"]),
    ("exclude_modules", ["q_proj"]),
    ("exclude_modules", "q.*"),
    ("target_parameters", ["mlp.experts"]),
    ("alora_invocation_tokens", [1, 2]),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("megatron_config", {"a": 1}),
    ("layer_replication", [[0, 1]]),
    ("trainable_token_indices", [3]),
    ("loftq_config", {"loftq_bits": 4}),
    ("eva_config", {"rho": 2.0}),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("use_dora", 1),
    ("use_rslora", "yes"),
    ("something_of_next_year", "on"),
    ("r", 0),
    ("r", 1 << 20),
    ("r", "3"),
    ("lora_alpha", 0),
    ("lora_alpha", None),
    ("lora_alpha", math.nan),
    ("lora_alpha", 10**400),
    ("lora_dropout", 1.0),
    ("target_modules", None),
    ("target_modules", [3]),
    ("target_modules", []),
    ("target_modules", ["nothing_here"]),
    ("target_modules", ["q_proj", "lm_head", "embed_tokens"]),
    ("layers_to_transform", ["1"]),
    ("layers_to_transform", [0]),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda part: str(part)[:40])
def test_what_cannot_be_represented_is_refused_by_name(folder, key, value):
    reconfigure(folder, **{key: value})
    named = {"r": "rank|r is", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    named["layers_to_transform"] = "layers_to_transform|layer 1 has .* without an adapter"
    named["target_modules"] = r"target_modules (must name|name|\['nothing_here'\] match)"
    refused(folder, ConfigError, f"adapter_config.json: .*({named.get(key, key)})")


HARMLESS = [
    {"peft_version": "9.9", "auto_mapping": {"x": "y"}, "revision": "main"},
    {"runtime_config": {"ephemeral_gpu_offload": False}, "megatron_core": "megatron.core"},
    {"next_years_switch": None, "next_years_list": [], "init_lora_weights": "gaussian"},
    {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 10}},
    {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
    {"target_modules": ["up_proj", "self_attn.q_proj", "not_in_this_model"]},
]


@pytest.mark.parametrize("settings", HARMLESS, ids=str)
def test_settings_without_effect_are_no_obstacle(folder, settings):
    reconfigure(folder, **settings)
    fresh = toy_base()
    load_adapter(fresh, folder)
    assert same(adapter_weights(fresh.model), adapter_weights(adapted().model))


def test_a_regular_expression_is_not_run(folder):
    reconfigure(folder, target_modules="(a+)+$|.*(q|up)_proj")
    with pytest.warns(AdapterWarning, match="regular expression, which is not run"):
        load_adapter(base := toy_base(), folder)
    assert same(adapter_weights(base.model), adapter_weights(adapted().model))
    weights = read_safetensors(folder / "adapter_model.safetensors")
    del weights[f"{PREFIX}lora_B.weight"]
    write_safetensors(folder / "adapter_model.safetensors", weights)
    refused(folder, WeightsError, r"1 missing: .*q_proj\.lora_B")
    write_safetensors(folder / "adapter_model.safetensors", {"a": mx.zeros(1)})
    refused(folder, ConfigError, "no tensor names a module")


def drop(weights):
    del weights[f"{PREFIX}lora_A.weight"]


def add(weights):
    weights["base_model.model.lm_head.lora_A.weight"] = mx.zeros((3, 32))


def add_lengths(weights):
    weights[f"{PREFIX}lora_magnitude_vector"] = mx.ones(32)


def turn(weights):
    weights[f"{PREFIX}lora_A.weight"] = weights[f"{PREFIX}lora_A.weight"].T


def spoil(weights):
    weights[f"{PREFIX}lora_B.weight"] = mx.full((32, 3), math.inf)


def truncate(weights):
    weights[f"{PREFIX}lora_B.weight"] = mx.zeros((32, 3), mx.int32)


BAD_TENSORS = {
    drop: r"1 missing: .*q_proj\.lora_A",
    add: r"1 unexpected: .*lm_head\.lora_A",
    add_lengths: r"1 unexpected: .*magnitude",
    turn: r"1 wrong shape: .*q_proj\.lora_A\.weight \(file \(32, 3\), network \(3, 32\)\)",
    spoil: r"q_proj\.lora_B\.weight holds NaN or infinity",
    truncate: r"1 wrong dtype: .*q_proj\.lora_B",
}


@pytest.mark.parametrize("change", BAD_TENSORS, ids=lambda change: change.__name__)
def test_bad_tensors_are_named_and_change_nothing(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = read_safetensors(path)
    change(weights)
    write_safetensors(path, weights)
    refused(folder, WeightsError, BAD_TENSORS[change])


def test_a_dora_without_its_lengths_is_refused(folder):
    reconfigure(folder, use_dora=True)
    refused(folder, WeightsError, "4 missing: .*lora_magnitude_vector")


def test_an_adapter_for_another_base_is_refused_by_shape_and_warned_of_by_name(folder):
    refused(folder, WeightsError, "for another base model", toy_base(hidden_size=64))
    reconfigure(folder, base_model_name_or_path="somebody/else-7B")
    load_adapter(toy_base(), folder)  # the same numbers, whatever it is called
    path = folder / "adapter_model.safetensors"
    write_safetensors(path, read_safetensors(path))  # as PEFT writes it: without a sketch
    with pytest.warns(AdapterWarning, match="made for 'somebody/else-7B'; this is 'toy'"):
        load_adapter(toy_base(), folder)


def test_pickled_weights_are_never_loaded(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, FileFormatError, "adapter_model.bin: is pickled")


def test_the_two_layouts_never_share_a_folder(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="holds an adapter in the layout of peft"):
        save_adapter(adapted(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_adapter(adapted(), tmp_path / "other")
    (tmp_path / "other/adapters.safetensors").rename(folder / "adapters.safetensors")
    refused(folder, FileFormatError, "holds adapters.safetensors and adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_a_damaged_file_is_named(folder, name, damage):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    refused(folder, FileFormatError, name)


def test_an_unknown_format_and_an_adapter_switched_off_are_refused(tmp_path):
    base = adapted()
    with pytest.raises(ConfigError, match=r"unknown format 'gguf'.*mlx-lm.*peft"):
        save_adapter(base, tmp_path / "a", format="gguf")
    with (
        wb.adapter_disabled(base.model),
        pytest.raises(ConfigError, match="switched off"),
    ):
        save_adapter(base, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_names_that_also_occur_elsewhere_are_written_whole(tmp_path):
    base = toy_base()
    wb.add_lora(base.model, wb.LoRAConfig(target_modules=["self_attn.q_proj"]))
    base.model.layers[0].mlp.q_proj = base.model.layers[0].mlp.up_proj
    base.model.update(tree_map(lambda a: a + 0.1, base.model.trainable_parameters()))
    save_adapter(base, tmp_path, format="peft")
    assert read_json(tmp_path / "adapter_config.json")["target_modules"] == ["self_attn.q_proj"]
