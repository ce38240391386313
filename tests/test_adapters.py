"""Adapters on disk: whole or not at all, and mlx-lm's own."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

import workbench as wb
from tests.process import run
from tests.toy import save_toy_folder, toy_base
from tests.toy_adapters import CONFIG, TOKENS, adapted, contents, randomise, same
from workbench.export.adapters import adapter_weights, load_adapter, save_adapter
from workbench.probes.parameters import changed, fingerprint
from workbench.tuning.lora import LoRAConfig, remove_lora

MLX_LM_LOGITS = """
    import json, sys
    import mlx.core as mx
    from mlx_lm.utils import load
    model, tokenizer = load({folder!r}, adapter_path={adapter!r})
    mx.save({out!r}, model(mx.array({tokens!r})))
"""


@pytest.mark.parametrize(
    "config", [CONFIG, LoRAConfig(rank=4, num_layers=1), LoRAConfig(target_modules="o_proj")]
)
def test_the_real_mlx_lm_loads_it_with_equal_logits(tmp_path, config):
    folder = save_toy_folder(tmp_path / "model")
    base = adapted(config)
    plain = toy_base().model(TOKENS)
    save_adapter(base, tmp_path / "adapter")
    out = tmp_path / "logits.npy"
    code = MLX_LM_LOGITS.format(
        folder=str(folder), adapter=str(tmp_path / "adapter"), out=str(out), tokens=TOKENS.tolist()
    )
    finished = run(code)
    assert finished.code == 0, finished.err
    logits = base.model(TOKENS)
    assert mx.abs(mx.load(str(out)) - logits).max() <= 1e-5 * mx.abs(logits).max()
    assert mx.abs(plain - logits).max() > 0.1


def test_a_round_trip_is_equal_bit_for_bit(tmp_path):
    base, fresh = adapted(), toy_base()
    fresh.model.eval()
    assert save_adapter(base, tmp_path) == tmp_path
    adapter = load_adapter(fresh, tmp_path)
    assert changed(fingerprint(base.model), fingerprint(fresh.model)) == []
    assert mx.array_equal(fresh.model(TOKENS), base.model(TOKENS))
    names = {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")}
    assert set(adapter.module_names) == names
    assert (adapter.config.rank, adapter.config.dropout) == (3, 0.25)
    assert adapter.config.scale == CONFIG.scale
    save_adapter(fresh, tmp_path / "again")
    assert (
        contents(tmp_path / "again")["adapter_config.json"]
        == (tmp_path / "adapter_config.json").read_bytes()
    )


def test_a_loaded_adapter_has_no_dropout_until_it_trains(tmp_path):
    save_adapter(adapted(), tmp_path)
    fresh = toy_base()
    fresh.model.eval()
    load_adapter(fresh, tmp_path)
    assert mx.array_equal(fresh.model(TOKENS), fresh.model(TOKENS))
    fresh.model.train()
    assert not mx.array_equal(fresh.model(TOKENS), fresh.model(TOKENS))


def test_a_loaded_adapter_replaces_the_one_there_and_trains(tmp_path):
    save_adapter(adapted(), tmp_path)
    other = adapted(LoRAConfig(rank=5), seed=1)
    load_adapter(other, tmp_path)
    assert same(adapter_weights(other.model), adapter_weights(adapted().model))
    trainable = {name for name, _ in tree_flatten(other.model.trainable_parameters())}
    assert trainable == set(adapter_weights(other.model))


@pytest.mark.parametrize("keys", ["absent", None, ["self_attn.q_proj", "mlp.down_proj"]])
@pytest.mark.parametrize("num_layers", [1, 2, -1])
def test_an_adapter_that_mlx_lm_made_loads_here(tmp_path, keys, num_layers):
    base = toy_base()
    twin = llama.Model(llama.ModelArgs.from_dict(base.raw_config))
    twin.load_weights(tree_flatten(base.model.parameters()))
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0}
    if keys != "absent":
        parameters["keys"] = keys
    twin.freeze()
    linear_to_lora_layers(twin, num_layers, parameters)
    randomise(twin)
    written = dict(tree_flatten(twin.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), written)
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(base, tmp_path)
    assert same(adapter_weights(base.model), written)
    expected = twin(TOKENS)
    assert mx.abs(base.model(TOKENS) - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_saving_over_an_older_one_replaces_both_files_and_nothing_else(tmp_path):
    save_adapter(adapted(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    newer = adapted(LoRAConfig(rank=2), seed=5)
    save_adapter(newer, tmp_path)
    names = ["README.md", "adapter_config.json", "adapters.safetensors", "notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    fresh = toy_base()
    load_adapter(fresh, tmp_path)
    assert same(adapter_weights(fresh.model), adapter_weights(newer.model))


def test_removing_a_loaded_adapter_gives_back_the_plain_model(tmp_path):
    save_adapter(adapted(), tmp_path)
    base = toy_base()
    before = fingerprint(base.model)
    wb.load_adapter(base, tmp_path)
    remove_lora(base.model)
    assert changed(before, fingerprint(base.model)) == []
