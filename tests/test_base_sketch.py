"""An adapter knows its base by its numbers, in whatever precision, and is refused on another."""

import base64
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
from workbench.models.files import read_safetensors, write_safetensors
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
