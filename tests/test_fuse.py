"""Fused folders: equal logits, complete for other tools, whole or not at all."""

import dataclasses
import json
import math
import os

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

import workbench as wb
from tests.process import run
from tests.toy import save_toy_folder, toy_base
from tests.toy_adapters import CONFIG, TOKENS, adapted, contents, randomise
from tests.toy_folders import equal_bits, reconfigure, weights_of
from workbench.errors import ConfigError, RunError, WeightsError
from workbench.export.adapters import save_adapter
from workbench.export.drift import Drift
from workbench.export.fuse import fuse
from workbench.models.files import read_json, read_weights, weight_files
from workbench.probes.parameters import changed, fingerprint

DORA = dataclasses.replace(CONFIG, use_dora=True)
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def difference(one, other):
    """Largest difference of two networks' logits."""
    return mx.abs(one.model(TOKENS) - other.model(TOKENS)).max().item()


@pytest.mark.parametrize("config", [CONFIG, DORA], ids=["lora", "dora"])
def test_a_fused_folder_gives_the_adapted_logits(tmp_path, config):
    base = adapted(config)
    before = fingerprint(base.model)
    fused = fuse(base, tmp_path / "fused")
    assert {path.name for path in fused.path.iterdir()} == FILES
    assert fused.tools == ("mlx-lm", "transformers")
    back = wb.load_model(fused)
    assert difference(back, toy_base()) > 0.1
    assert difference(back, base) <= 1e-5 * mx.abs(base.model(TOKENS)).max().item()
    assert changed(before, fingerprint(base.model)) == []
    assert back.tokenizer.chat_template == base.tokenizer.chat_template
    assert back.eos_token_ids == base.eos_token_ids
    assert wb.generate(back, "Peru?", max_tokens=5) == wb.generate(base, "Peru?", max_tokens=5)


def test_without_an_adapter_every_tensor_is_the_base_models(tmp_path):
    base = toy_base(tie_word_embeddings=False)
    fuse(base, tmp_path / "fused")
    assert equal_bits(read_weights(tmp_path / "fused"), weights_of(base.model))


def test_shards_have_an_index_and_none_of_an_earlier_export_stays(tmp_path):
    base = adapted()
    fuse(base, tmp_path / "fused", max_shard_bytes=20_000)
    shards = weight_files(tmp_path / "fused")
    assert len(shards) > 2
    assert all(path.stat().st_size < 40_000 for path in shards)
    assert difference(wb.load_model(tmp_path / "fused"), base) < 1e-4
    fuse(base, tmp_path / "fused")
    assert {path.name for path in (tmp_path / "fused").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_the_dtype_is_the_one_asked_for(tmp_path):
    fuse(adapted(), tmp_path / "fused", dtype=mx.bfloat16)
    assert {w.dtype for w in read_weights(tmp_path / "fused").values()} == {mx.bfloat16}
    assert read_json(tmp_path / "fused/config.json")["dtype"] == "bfloat16"


def test_config_has_what_transformers_and_mlx_lm_need(tmp_path):
    folder = save_toy_folder(tmp_path / "model")
    new_style = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    reconfigure(folder, rope_theta=None, rope_parameters=new_style, torch_dtype="float16")
    base = wb.load_model(folder)
    fuse(base, tmp_path / "fused")
    config = read_json(tmp_path / "fused/config.json")
    # mlx-lm knows no rope_parameters: it would rotate with its default in silence.
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert not config.keys() & {"rope_parameters", "torch_dtype"}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert difference(wb.load_model(tmp_path / "fused"), base) == 0


def test_generation_settings_are_the_base_models(tmp_path):
    folder = save_toy_folder(tmp_path / "model")
    settings = {"temperature": 0.3, "do_sample": True, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    fuse(wb.load_model(folder), tmp_path / "fused")
    assert read_json(tmp_path / "fused/generation_config.json") == settings
    assert wb.load_model(tmp_path / "fused").eos_token_ids == {0, 2}


def test_the_tokenizers_class_is_known_to_older_transformers(tmp_path):
    fuse(adapted(), tmp_path / "fused")
    config = read_json(tmp_path / "fused/tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_fuse_says_how_far_it_moves_the_logits(tmp_path, bits):
    base = adapted()
    quantise = {"bits": bits, "group_size": 32}
    fused = fuse(base, tmp_path / "fused", quantise=quantise, force=True)
    assert read_json(tmp_path / "fused/config.json")["quantization"] == {
        **quantise,
        "mode": "affine",
    }
    assert fused.tools == ("mlx-lm",)
    assert 0 < fused.drift.rounding < fused.drift.adapter
    assert f"the adapter by {fused.drift.adapter:.3g}" in str(fused)
    weights = read_weights(tmp_path / "fused")
    weight, scales = (weights[f"model.embed_tokens.{name}"] for name in ("weight", "scales"))
    assert (weight.dtype, weight.shape[1]) == (mx.uint32, bits)  # of 32 columns
    assert scales.shape == (259, 1)


def on_the_grid(base):
    """Weights that 4 bits hold exactly, as those of a quantised base are: whole numbers / 16."""
    for number, module in enumerate(base.model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            key = mx.random.key(number)
            whole = mx.random.randint(-8, 8, module.weight.shape, key=key)
            whole[..., ::32], whole[..., 1::32] = -8, 7  # each group spans all sixteen
            module.weight = whole / 16


def test_an_adapter_that_rounding_swallows_is_refused(tmp_path):
    base = toy_base()
    on_the_grid(base)
    wb.add_lora(base.model, CONFIG)
    base.model.update(tree_map(lambda a: a + 0.01, base.model.trainable_parameters()))
    quantise = {"bits": 4, "group_size": 32}
    with pytest.raises(WeightsError, match=r"swallows the adapter: .* 100 % of what it does is lo"):
        fuse(base, tmp_path / "fused", quantise=quantise)
    assert list(tmp_path.iterdir()) == []
    forced = fuse(base, tmp_path / "fused", quantise=quantise, force=True)
    assert forced.drift.lost == pytest.approx(1, abs=0.01)
    assert fuse(base, tmp_path / "fused", quantise={**quantise, "bits": 8}).drift.lost < 0.1


def test_an_adapter_that_rounding_drowns_is_refused(tmp_path):
    base = toy_base()
    wb.add_lora(base.model, CONFIG)
    base.model.update(tree_map(lambda a: a + 1e-4, base.model.trainable_parameters()))
    with pytest.raises(WeightsError, match="swallows the adapter"):
        fuse(base, tmp_path / "fused", quantise={"bits": 3, "group_size": 32})


@pytest.mark.parametrize(
    ("adapter", "rounding", "lost", "swallows"),
    [
        (1.0, 1.9, 0.4, False),
        (1.0, 0.6, 0.6, True),
        (1.0, 2.1, 0.0, True),
        (1.0, 2.1, -0.5, True),
        (1.0, math.nan, math.nan, True),
        (1.0, math.inf, -math.inf, True),
        (0.0, 2.1, None, False),
        (None, 2.1, None, False),
    ],
)
def test_rounding_swallows_what_it_takes_back_or_drowns(adapter, rounding, lost, swallows):
    assert Drift(adapter, rounding, lost).swallows == swallows


def test_a_fresh_adapter_has_nothing_to_lose(tmp_path):
    base = toy_base()
    wb.add_lora(base.model)
    fused = fuse(base, tmp_path / "fused", quantise={"bits": 4, "group_size": 32})
    assert (fused.drift.adapter, fused.drift.lost) == (0, None)


def test_weights_that_are_quantised_in_memory_are_written_plain(tmp_path):
    base = toy_base()
    base.model.eval()
    nn.quantize(base.model, group_size=32, bits=8)
    wb.add_lora(base.model, DORA)
    trainable = base.model.trainable_parameters()
    base.model.update(tree_map(lambda a: a + 0.05, trainable))
    fuse(base, tmp_path / "fused")
    back = wb.load_model(tmp_path / "fused")
    assert difference(back, base) < 1e-4 * mx.abs(base.model(TOKENS)).max().item()


MODES = {"affine": (4, 32), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def adapted_in(mode, dtype=mx.float32):
    """A toy whose base is quantised in this mode, with an adapter that has moved."""
    base = toy_base()
    base.model.update(tree_map(lambda a: a.astype(dtype), base.model.parameters()))
    bits, group_size = MODES[mode]
    nn.quantize(base.model, group_size=group_size, bits=bits, mode=mode)
    wb.add_lora(base.model, CONFIG)
    base.model.eval()
    randomise(base.model)
    return base


@pytest.mark.parametrize("mode", MODES)
def test_a_base_quantised_in_any_mode_fuses_to_the_adapted_logits(tmp_path, mode):
    base = adapted_in(mode)
    logits = base.model(TOKENS)
    with wb.adapter_disabled(base.model):
        assert mx.abs(logits - base.model(TOKENS)).max() > 0.1
    fuse(base, tmp_path / "fused")
    assert difference(wb.load_model(tmp_path / "fused"), base) <= 1e-5 * mx.abs(logits).max().item()
    fused = fuse(base, tmp_path / "fused", quantise={"bits": 8, "group_size": 32})
    assert fused.drift.rounding < 0.1 * fused.drift.adapter


@pytest.mark.parametrize("mode", MODES)
def test_a_fused_weight_is_rounded_once_to_the_networks_dtype(tmp_path, mode):
    base = adapted_in(mode, mx.bfloat16)
    fuse(base, tmp_path / "fused")
    weights = read_weights(tmp_path / "fused")
    assert {array.dtype for array in weights.values()} == {mx.bfloat16}
    exact = base.model.layers[1].mlp.up_proj.fused_weight()
    written = weights["model.layers.1.mlp.up_proj.weight"]
    assert (mx.abs(written - exact) <= 2**-8 * mx.abs(exact)).all()


def test_a_weight_that_is_no_floating_number_is_refused(tmp_path):
    base = adapted()
    base.model.layers[0].mlp.up_proj.linear.weight = mx.ones((64, 32), mx.uint8)
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.up_proj\.weight holds .*uint8"):
        fuse(base, tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_numbers_beyond_the_dtype_are_named(tmp_path):
    base = toy_base()
    base.model.layers[0].mlp.up_proj.weight *= 1e6
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.up_proj\.weight holds .*bfloat16"):
        fuse(base, tmp_path / "fused", dtype=mx.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"quantise": {"bits": 4}},
        {"quantise": {"bits": 7, "group_size": 32}},
        {"quantise": 4},
        {"dtype": mx.int32},
        {"dtype": "float16"},
        {"prompts": []},
        {"prompts": "one question"},
        {"prompts": [3], "quantise": {"bits": 4, "group_size": 32}},
        {"prompts": 3},
        {"run_dir": "nowhere"},
    ],
    ids=str,
)
def test_impossible_settings_are_named_and_write_nothing(tmp_path, settings):
    with pytest.raises((ConfigError, RunError)):
        fuse(adapted(), tmp_path / "fused", **settings)
    assert list(tmp_path.iterdir()) == []


def somebodys(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def an_older_model(folder):
    save_toy_folder(folder)


def a_changed_export(folder):
    fuse(adapted(), folder)
    (folder / "README.md").write_text("what I found out")


def an_export_with_more(folder):
    fuse(adapted(), folder)
    (folder / "model-extra.safetensors").write_bytes(b"mine")


@pytest.mark.parametrize("fill", [somebodys, an_older_model, a_changed_export, an_export_with_more])
def test_what_is_no_export_is_refused_and_moved_aside_by_force(tmp_path, fill):
    folder = tmp_path / "place"
    fill(folder)
    before = contents(folder)
    with pytest.raises(ConfigError, match="holds something else"):
        fuse(adapted(), folder)
    assert contents(folder) == before
    fuse(adapted(), folder, force=True)
    assert {path.name for path in folder.iterdir()} == FILES
    assert contents(tmp_path / "place.before-1") == before


def test_the_base_models_own_folder_is_never_written(tmp_path):
    folder = save_toy_folder(tmp_path / "model")
    base, before = wb.load_model(folder), contents(folder)
    for place in (folder, tmp_path, folder / "inside"):
        with pytest.raises(ConfigError, match="base model's own place"):
            fuse(base, place, force=True)
    assert contents(folder) == before


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "fused").write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        fuse(adapted(), tmp_path / "fused", force=True)


FULL = """
    import os, resource, signal
    from pathlib import Path
    from tests.toy_adapters import adapted, contents
    from workbench.errors import FileFormatError
    from workbench.export.fuse import fuse
    base, place = adapted(), Path({folder!r})
    before = contents(place) if place.exists() else None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (100, 3_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            fuse(base, place, force=True)
        except FileFormatError as error:
            print("refused:", error)
        assert os.listdir(place.parent) == (["place"] if before else [])
        assert before is None or contents(place) == before
"""


@pytest.mark.parametrize("fill", [None, somebodys])
def test_a_full_disk_leaves_what_was_there(tmp_path, fill):
    if fill:
        fill(tmp_path / "place")
    finished = run(FULL.format(folder=str(tmp_path / "place")))
    assert finished.code == 0, finished.err
    refusals = [line for line in finished.out.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 3
    assert all("cannot be written" in line for line in refusals)


def test_a_killed_process_leaves_no_half_of_an_export(tmp_path):
    code = """
        import os, sys
        from tests.toy_adapters import adapted
        from workbench.export.fuse import fuse
        base = adapted()
        def kill(event, args):
            if event == "os.rename" and str(args[1]).endswith("place"):
                os._exit(9)
        sys.addaudithook(kill)
        fuse(base, {folder!r})
    """
    assert run(code.format(folder=str(tmp_path / "place"))).code == 9
    assert all(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
    fuse(adapted(), tmp_path / "place")


def test_what_was_moved_aside_comes_back_if_the_last_step_fails(tmp_path):
    somebodys(tmp_path / "place")
    finished = run(f"""
        import errno, sys
        from tests.toy_adapters import adapted
        from workbench.errors import FileFormatError
        from workbench.export.fuse import fuse
        base, failed = adapted(), []
        def fail(event, args):
            if event == "os.rename" and str(args[1]).endswith("/place") and not failed:
                failed.append(args)
                raise OSError(errno.EIO, "input/output error")
        sys.addaudithook(fail)
        try:
            fuse(base, {str(tmp_path / "place")!r}, force=True)
        except FileFormatError as error:
            print(error)
    """)
    assert "cannot be written (input/output error)" in finished.out, finished.err
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert contents(tmp_path / "place") == {"thesis.txt": b"mine"}


def test_mlx_lm_fuses_our_adapter_to_the_same_weights(tmp_path):
    folder = save_toy_folder(tmp_path / "model")
    base = wb.load_model(folder)
    for use_dora in (False, True):
        config = dataclasses.replace(CONFIG, use_dora=use_dora)
        wb.add_lora(base.model, config)
        base.model.update(tree_map(lambda a: a + 0.05, base.model.trainable_parameters()))
        fuse(base, tmp_path / "ours")
        save_adapter(base, tmp_path / "adapter")
        finished = run(f"""
            import sys
            from mlx_lm import fuse
            sys.argv = ["fuse", "--model", {str(folder)!r}, "--adapter-path",
                        {str(tmp_path / "adapter")!r}, "--save-path", {str(tmp_path / "theirs")!r}]
            fuse.main()
        """)
        assert finished.code == 0, finished.err
        ours, theirs = read_weights(tmp_path / "ours"), read_weights(tmp_path / "theirs")
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert mx.allclose(array, theirs[name], rtol=1e-5, atol=1e-6), name


def test_nan_in_the_adapter_is_refused(tmp_path):
    base = adapted()
    base.model.layers[0].mlp.up_proj.lora_b += math.nan
    with pytest.raises(WeightsError, match="holds NaN"):
        fuse(base, tmp_path / "fused")
    assert os.listdir(tmp_path) == []
