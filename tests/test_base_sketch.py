"""An adapter knows its base by its numbers, in whatever precision, and is refused on another."""

import base64
import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

import workbench as wb
from tests.toy import toy_base
from tests.toy_adapters import CONFIG, TOKENS, adapted, same
from workbench.errors import AdapterWarning, FileFormatError, WeightsError
from workbench.export.adapters import adapter_weights, load_adapter, save_adapter
from workbench.export.base_sketch import KEY
from workbench.models.files import read_json, read_safetensors, write_safetensors
from workbench.models.safetensors_header import read_metadata
from workbench.probes.parameters import changed, fingerprint

WEIGHTS = {"mlx-lm": "adapters.safetensors", "peft": "adapter_model.safetensors"}

each_layout = pytest.mark.parametrize("layout", WEIGHTS)


@pytest.fixture
def saved(tmp_path, layout):
    return save_adapter(adapted(), tmp_path / "adapter", layout)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        yield


@each_layout
def test_another_base_of_the_same_shape_is_refused_and_left_as_it_was(saved):
    other = toy_base(seed=1)
    before = fingerprint(other.model)
    with pytest.raises(WeightsError, match=r"differ from 'toy' by 1\d\d%.*another model") as caught:
        load_adapter(other, saved)
    assert "any_base=True" in caught.value.cure
    assert changed(before, fingerprint(other.model)) == []


@each_layout
def test_it_goes_onto_another_base_on_request(saved):
    other = toy_base(seed=1)
    with pytest.warns(AdapterWarning, match="numbers differ"):
        load_adapter(other, saved, any_base=True)
    assert same(adapter_weights(other.model), adapter_weights(adapted().model))


@each_layout
def test_the_same_base_is_known_in_16_bits_and_below_an_adapter(saved):
    rounded = toy_base()
    rounded.model.update(tree_map(lambda a: a.astype(mx.bfloat16), rounded.model.parameters()))
    load_adapter(rounded, saved)
    replaced = adapted(wb.LoRAConfig(rank=2), seed=3)
    load_adapter(replaced, saved)
    assert mx.array_equal(replaced.model(TOKENS), adapted().model(TOKENS))


@each_layout
@pytest.mark.parametrize("bits", [2, 4])
def test_the_same_base_in_few_bits_is_used_with_a_warning(saved, bits):
    base = toy_base()
    nn.quantize(base.model, group_size=32, bits=bits)
    with pytest.warns(AdapterWarning, match="numbers differ"):
        load_adapter(base, saved)
    known = save_adapter(base, saved.parent / "again", "mlx-lm")  # the base as it is in few bits
    load_adapter(base, known)


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@each_layout
def test_a_built_in_model_is_named_as_on_the_hub(tmp_path, layout):
    base = adapted()
    base.name = "smollm2-135m"
    save_adapter(base, tmp_path, layout)
    key = {"mlx-lm": "model", "peft": "base_model_name_or_path"}[layout]
    assert read_json(tmp_path / "adapter_config.json")[key] == HUB_ID
    assert f"base_model: {HUB_ID}\n" in (tmp_path / "README.md").read_text()
    assert f"adapter for {HUB_ID}" in (tmp_path / "README.md").read_text()


@each_layout
@pytest.mark.parametrize("named", ["smollm2-135m", HUB_ID, "mine/smollm2-135m-instruct"])
@pytest.mark.parametrize("called", ["smollm2-135m", HUB_ID, "models/SmolLM2-135M-Instruct"])
def test_both_names_of_a_built_in_model_are_the_same(saved, layout, named, called):
    key = {"mlx-lm": "model", "peft": "base_model_name_or_path"}[layout]
    config = {**read_json(saved / "adapter_config.json"), key: named}
    (saved / "adapter_config.json").write_text(json.dumps(config))
    weights = saved / WEIGHTS[layout]
    write_safetensors(weights, read_safetensors(weights))  # without a sketch, names are compared
    base = toy_base()
    base.name = called
    load_adapter(base, saved)
    base.name = "another/model-135M"
    with pytest.warns(AdapterWarning, match="was made for"):
        load_adapter(base, saved)


def test_an_adapter_on_one_layer_keeps_as_many_numbers(tmp_path):
    config = wb.LoRAConfig(rank=2, target_modules=["q_proj"], num_layers=1)
    path = save_adapter(adapted(config), tmp_path) / WEIGHTS["mlx-lm"]
    assert len(base64.b64decode(read_metadata(path)[KEY])) == 256 * 4  # float32
    with pytest.raises(WeightsError, match="another model"):
        load_adapter(toy_base(seed=1), tmp_path)


@pytest.mark.parametrize("text", ["", "AAAA", "no base 64!", "AADAfw==", "AAAAAAAAAAAAAAAAAAAAAA"])
def test_a_damaged_sketch_is_refused_by_name(tmp_path, text):
    path = save_adapter(adapted(CONFIG), tmp_path) / WEIGHTS["mlx-lm"]
    write_safetensors(path, read_safetensors(path), {KEY: text})
    with pytest.raises(FileFormatError, match=KEY):
        load_adapter(toy_base(), tmp_path)
