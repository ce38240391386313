"""Adapters and configurations that lie: refused by name, the model unchanged."""

import json
import os
import re
import shutil

import mlx.core as mx
import pytest

from tests.faults.cases import run_case
from tests.toy_folders import reconfigure
from workbench.export.adapters import CONFIG_NAME, WEIGHTS_NAME
from workbench.models.files import read_safetensors, write_safetensors

CLASS = "adapters and configs"
ATTACH = "tests.faults.actions:attach_adapter"
LOAD = "tests.faults.actions:load"


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of the adapter, to be spoilt."""
    return shutil.copytree(saved / "adapter", tmp_path / "adapter")


def refuse(server, action, folder, name, says):
    """Run a case that must be refused: the file is named, and what is wrong with it."""
    outcome = run_case(server, CLASS, action, str(folder), folder.parent)
    assert outcome.kind == "typed error", outcome
    assert name in outcome.text
    assert re.search(says, outcome.text), outcome.text
    assert len(outcome.text) < 2_000


def test_the_whole_adapter_and_the_whole_model_load(server, adapter, model):
    assert run_case(server, CLASS, ATTACH, str(adapter), adapter).value == 4
    assert run_case(server, CLASS, LOAD, str(model), model).value == {"finite": True, "ends": [2]}


LORA = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
ADAPTER_CONFIGS = {  # the content of adapter_config.json, and what the error says
    "empty": ("", "not valid JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "null": ("null", "must hold a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "nested beyond reason": ('{"a":' * 10_000, "nested deeper"),
    "nested a little too deep": ('{"a":' * 80 + "1" + "}" * 80, "nested deeper"),
    "a million lists": ('{"a": [' + "[]," * 2_000_000 + "[]]}", "more than 2000000"),
    "a key twice": ('{"num_layers": 2, "num_layers": 1}', "'num_layers' twice"),
    "a number of 5000 digits": ('{"num_layers": 1' + "0" * 5000 + "}", "4300"),
    "a pickle": (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.", "utf-8"),
    "another kind": ({"fine_tune_type": "full"}, "'full' is not supported"),
    "a kind that is a list": ({"fine_tune_type": ["lora"] * 10_000}, "is not supported"),
    "no parameters": ({"lora_parameters": None}, "lora_parameters"),
    "parameters in a list": ({"lora_parameters": [1]}, "lora_parameters"),
    "layers beyond the model": ({"num_layers": 10**9}, "exceeds the model's 2 layers"),
    "layers of truth": ({"num_layers": True}, "whole number"),
    "layers with a point": ({"num_layers": 2.0}, "whole number"),
}
PARAMETERS = {
    "a rank of 0": ({"rank": 0}, "rank must be a whole number"),
    "a negative rank": ({"rank": -3}, "rank must be a whole number"),
    "a huge rank": ({"rank": 10**15}, "rank is beyond reason"),
    "a rank of infinity": ({"rank": float("inf")}, "rank is beyond reason"),
    "a rank of NaN": ({"rank": float("nan")}, "rank must be a whole number"),
    "a rank of truth": ({"rank": True}, "rank must be a number"),
    "another rank": ({"rank": 2}, "wrong shape"),
    "a scale of NaN": ({"scale": float("nan")}, "alpha must be a number"),
    "a scale beyond all floats": ({"scale": 1e308}, "alpha must be a number"),
    "a negative scale": ({"scale": -1.0}, "alpha must be a number"),
    "a dropout of 1": ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    "a dropout of infinity": ({"dropout": float("inf")}, "dropout must be a number"),
    "a text for a number": ({"scale": "2"}, "scale must be a number"),
    "no keys": ({"keys": []}, "list of module names"),
    "keys in an object": ({"keys": {"q_proj": 1}}, "list of module names"),
    "keys that lead out of the layers": ({"keys": ["embed_tokens", "../lm_head"]}, "match nothing"),
    "keys of another model": ({"keys": ["self_attn.qkv_proj"]}, "match nothing"),
    "keys of other layers": ({"keys": ["mlp.down_proj"]}, "missing|unexpected"),
}


@pytest.mark.parametrize("name", [*ADAPTER_CONFIGS, *PARAMETERS])
def test_an_adapters_configuration_that_lies_is_refused(server, adapter, name):
    content, says = {**ADAPTER_CONFIGS, **PARAMETERS}[name]
    path = adapter / CONFIG_NAME
    if isinstance(content, dict):
        whole = json.loads(path.read_text())
        changes = {"lora_parameters": {**LORA, **content}} if name in PARAMETERS else content
        content = json.dumps({**whole, **changes})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    file = "adapter" if says in ("wrong shape", "missing|unexpected") else CONFIG_NAME
    refuse(server, ATTACH, adapter, file, says)


def lose_one(tensors):
    tensors.popitem()


def add_a_base_weight(tensors):
    tensors["model.embed_tokens.weight"] = mx.zeros((259, 32))


def add_the_wrapped_weight(tensors):
    tensors["model.layers.0.self_attn.q_proj.linear.weight"] = mx.zeros((32, 32))


def add_a_setting(tensors):
    tensors["model.layers.0.self_attn.q_proj.scale"] = mx.array(100.0)


def make_whole_numbers(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.astype(mx.int32)


def put_nan(tensors):
    name = min(tensors)
    tensors[name] = tensors[name] * mx.nan


def swap_a_and_b(tensors):
    for name in [name for name in tensors if name.endswith("lora_a")]:
        other = name.replace("lora_a", "lora_b")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def be_nothing(tensors):
    tensors.clear()


TENSORS = {
    lose_one: "1 missing",
    add_a_base_weight: r"1 unexpected: model\.embed_tokens",
    add_the_wrapped_weight: r"1 unexpected: .*linear\.weight",
    add_a_setting: r"1 unexpected: .*scale",
    make_whole_numbers: "wrong dtype",
    put_nan: "NaN or infinity",
    swap_a_and_b: "wrong shape",
    be_nothing: "8 missing",
}


@pytest.mark.parametrize("spoil", TENSORS, ids=lambda spoil: spoil.__name__)
def test_other_tensors_than_the_adapters_own_are_refused(server, adapter, spoil):
    tensors = read_safetensors(adapter / WEIGHTS_NAME)
    mx.eval(tensors)
    spoil(tensors)
    write_safetensors(adapter / WEIGHTS_NAME, tensors)
    refuse(server, ATTACH, adapter, WEIGHTS_NAME, TENSORS[spoil])


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("kind", ["link out", "pipe", "folder"])
def test_an_adapters_file_that_is_none_is_refused(server, adapter, name, kind):
    path = adapter / name
    path.rename(adapter.parent / name)
    if kind == "link out":
        path.symlink_to(f"../{name}")
    else:
        {"pipe": os.mkfifo, "folder": os.mkdir}[kind](path)
    says = "leads out of its folder" if kind == "link out" else "not a regular file"
    refuse(server, ATTACH, adapter, name, says)


# A model's configuration

HUGE = 10**30
CONFIGS = {
    "a width of 0": ({"hidden_size": 0}, "hidden_size must be"),
    "a huge width": ({"hidden_size": HUGE}, "hidden_size must be"),
    "a width that no memory holds": (
        {"hidden_size": 1 << 20, "vocab_size": 1 << 24, "head_dim": 8},
        "wrong shape",
    ),
    "a width in a list": ({"hidden_size": [32] * 100_000}, "hidden_size must be"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "beyond reason"),
    "more layers than files hold": ({"num_hidden_layers": 900}, "missing"),
    "infinite layers": ({"num_hidden_layers": float("inf")}, "beyond reason"),
    "a billion heads": ({"num_attention_heads": 10**9}, "beyond reason"),
    "a huge width of heads": ({"head_dim": 1 << 16, "num_attention_heads": 1 << 16}, "beyond"),
    "a negative context": ({"max_position_embeddings": -5}, "max_position_embeddings"),
    "a huge vocabulary": ({"vocab_size": HUGE}, "vocab_size must be"),
    "an epsilon of infinity": ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be"),
    "a RoPE base beyond reason": ({"rope_theta": 1e300}, "rope_theta must be"),
    "a RoPE in a list": ({"rope_scaling": [1, 2]}, "rope_scaling: must be an object"),
    "an end token that is a text": ({"eos_token_id": "2"}, "eos_token_id must be"),
    "end tokens in lists": ({"eos_token_id": [[2]]}, "eos_token_id must be"),
    "a model type that is a number": ({"model_type": 7}, "missing model_type"),
    "a model type that is a path": ({"model_type": "../../evil"}, "cannot build a '../../evil'"),
    "a model type with NUL": ({"model_type": "a\0b"}, "cannot build"),
    "code to run": ({"model_type": "mine", "auto_map": {"AutoConfig": "x.X"}}, "cannot|readable"),
    "quantised by nothing": ({"quantization": {"group_size": 0, "bits": 0}}, "group_size and bits"),
    "quantised in a list": ({"quantization": [4]}, "quantization must be an object"),
    "quantised in one layer": (
        {"quantization": {"group_size": 32, "bits": 4, "lm_head": {"bits": -1}}},
        "group_size and bits",
    ),
    "an activation in a list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "qwen2 with a width in a list": (
        {"model_type": "qwen2", "hidden_size": [32]},
        "cannot build a 'qwen2'",
    ),
    "qwen2 with a billion layers": ({"model_type": "qwen2", "num_hidden_layers": 10**9}, "beyond"),
    "qwen2 without heads": ({"model_type": "qwen2", "num_attention_heads": 0}, "cannot build"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_configuration_that_lies_is_refused(server, model, name):
    changes, says = CONFIGS[name]
    reconfigure(model, **changes)
    file = "model" if says in ("missing", "wrong shape") or "cannot" in says else "config.json"
    refuse(server, LOAD, model, file, says)
