"""A bad adapter changes no model; a failed save changes no file."""

import json
import math

import mlx.core as mx
import pytest

from tests.process import run
from tests.toy import save_toy_folder, toy_base
from tests.toy_adapters import adapted, contents, same
from workbench.errors import ConfigError, FileFormatError, WeightsError
from workbench.export.adapters import adapter_weights, load_adapter, save_adapter
from workbench.models.files import read_safetensors, write_safetensors
from workbench.models.loading import load_model
from workbench.probes.parameters import changed, fingerprint
from workbench.tuning.lora import add_lora


def q_proj(weights):
    return next(name for name in weights if name.endswith("q_proj.lora_a"))


def spoil_missing(weights):
    weights.pop(q_proj(weights))


def spoil_extra(weights):
    weights["model.layers.0.mlp.down_proj.lora_a"] = mx.zeros((64, 3))


def spoil_shape(weights):
    weights[q_proj(weights)] = mx.zeros((32, 4))


def spoil_transposed(weights):
    weights[q_proj(weights)] = weights[q_proj(weights)].T


def spoil_dtype(weights):
    weights[q_proj(weights)] = mx.zeros((32, 3), mx.int32)


def spoil_nan(weights):
    weights[q_proj(weights)] = mx.full((32, 3), math.nan)


def spoil_all(weights):
    weights.clear()
    weights["something"] = mx.zeros(3)


BAD_WEIGHTS = {
    spoil_missing: "1 missing: .*q_proj.lora_a",
    spoil_extra: "1 unexpected: .*down_proj.lora_a",
    spoil_shape: r"1 wrong shape: .*q_proj.lora_a \(file \(32, 4\), network \(32, 3\)\)",
    spoil_transposed: "1 wrong shape: .*q_proj.lora_a",
    spoil_dtype: "1 wrong dtype: .*q_proj.lora_a",
    spoil_nan: "q_proj.lora_a holds NaN",
    spoil_all: "8 missing.*1 unexpected: something",
}


@pytest.mark.parametrize("spoil", BAD_WEIGHTS, ids=lambda spoil: spoil.__name__)
def test_bad_weights_raise_and_change_nothing(tmp_path, spoil):
    save_adapter(adapted(seed=1), tmp_path)
    weights = read_safetensors(tmp_path / "adapters.safetensors")
    spoil(weights)
    write_safetensors(tmp_path / "adapters.safetensors", weights)
    base = adapted()
    before = fingerprint(base.model)
    with pytest.raises(WeightsError, match=BAD_WEIGHTS[spoil]):
        load_adapter(base, tmp_path)
    assert changed(before, fingerprint(base.model)) == []


LORA = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}

BAD_CONFIGS = [
    ({"fine_tune_type": "full", "num_layers": 2, "lora_parameters": LORA}, "'full'"),
    ({"num_layers": 2}, "lora_parameters"),
    ({"num_layers": "all", "lora_parameters": LORA}, "num_layers must be a whole number"),
    ({"num_layers": 3, "lora_parameters": LORA}, "num_layers 3 exceeds"),
    *[
        ({"num_layers": 2, "lora_parameters": {**LORA, key: value}}, message)
        for key, value, message in [
            ("rank", 0, "rank"),
            ("rank", None, "rank must be a number"),
            ("rank", 2.5, "rank"),
            ("scale", "2", "scale must be a number"),
            ("scale", math.nan, "alpha"),
            ("scale", 10**400, "alpha"),
            ("dropout", 1, "dropout"),
            ("keys", [], "keys must be a list"),
            ("keys", [3], "keys must be a list"),
            ("keys", ["self_attn.qkv"], r"\['self_attn.qkv'\] match nothing"),
        ]
    ],
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS, ids=lambda part: str(part)[:60])
def test_a_bad_configuration_raises_and_changes_nothing(tmp_path, config, message):
    save_adapter(adapted(seed=1), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = adapted()
    before = fingerprint(base.model)
    with pytest.raises(ConfigError, match=message):
        load_adapter(base, tmp_path)
    assert changed(before, fingerprint(base.model)) == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
@pytest.mark.parametrize("damage", ["absent", "empty", "cut"])
def test_a_damaged_file_raises_and_changes_nothing(tmp_path, name, damage):
    save_adapter(adapted(seed=1), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage != "absent":
        (tmp_path / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    base = adapted()
    before = fingerprint(base.model)
    with pytest.raises(FileFormatError, match=name):
        load_adapter(base, tmp_path)
    assert changed(before, fingerprint(base.model)) == []


def test_nothing_attached_raises_and_writes_nothing(base, tmp_path):
    with pytest.raises(ConfigError, match=r"no adapter is attached.*wb\.add_lora"):
        save_adapter(base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def ruin_with_nan(base):
    base.model.layers[0].mlp.up_proj.lora_b += math.nan


def ruin_one_layer(base):
    layer = base.model.layers[1].mlp
    layer.up_proj = layer.up_proj.linear


@pytest.mark.parametrize("ruin", [ruin_with_nan, ruin_one_layer], ids=lambda f: f.__name__)
def test_a_refused_save_leaves_the_older_one_untouched(tmp_path, ruin):
    save_adapter(adapted(), tmp_path)
    before, base = contents(tmp_path), adapted(seed=1)
    ruin(base)
    with pytest.raises((ConfigError, WeightsError)):
        save_adapter(base, tmp_path)
    assert contents(tmp_path) == before


def test_layers_with_other_settings_are_named(tmp_path):
    base = adapted()
    base.model.layers[1].mlp.up_proj.scale = 7.0
    with pytest.raises(ConfigError, match=r"one rank, scale, .*3\.33.* and \(3, 7\.0.*wb\.fuse"):
        save_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize("layout", ["mlx-lm", "peft"])
def test_the_base_models_own_folder_is_refused(tmp_path, layout):
    base = load_model(save_toy_folder(tmp_path / "model"))
    add_lora(base.model)
    before = contents(tmp_path / "model")
    with pytest.raises(ConfigError, match="the base model's own folder"):
        save_adapter(base, tmp_path / "model" / ".", layout)
    assert contents(tmp_path / "model") == before


def test_a_refused_save_leaves_no_new_folder(tmp_path):
    base = adapted()
    ruin_one_layer(base)
    what = r"layer 1 has mlp\.up_proj without an adapter\. wb\.fuse"
    with pytest.raises(ConfigError, match=what):
        save_adapter(base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
def test_a_folder_in_a_files_place_raises_and_nothing_half_written_stays(tmp_path, name):
    (tmp_path / name / "inside").mkdir(parents=True)
    with pytest.raises(FileFormatError, match="cannot be written"):
        save_adapter(adapted(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_the_folders_place_raises(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(FileFormatError, match="cannot be written"):
        save_adapter(adapted(), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


KILLED = """
    import os, sys
    import workbench as wb
    from tests.toy_adapters import adapted
    from workbench.tuning.lora import LoRAConfig
    base, count = adapted(LoRAConfig(rank=3), seed=9), [0]
    def kill(event, args):
        if event == {event!r}:
            count[0] += 1
            if count[0] == {nth}:
                os._exit(9)
    sys.addaudithook(kill)
    wb.save_adapter(base, {folder!r})
"""


@pytest.mark.parametrize("nth", [1, 3, 4])
def test_a_process_that_dies_while_saving_leaves_no_mixture(tmp_path, nth):
    save_adapter(adapted(), tmp_path)
    # os.replace raises this event: twice for the staged files, twice for the final ones.
    assert run(KILLED.format(event="os.rename", nth=nth, folder=str(tmp_path))).code == 9
    fresh = toy_base()
    try:
        load_adapter(fresh, tmp_path)
    except FileFormatError:
        assert nth > 1
    else:
        assert same(adapter_weights(fresh.model), adapter_weights(adapted().model))
