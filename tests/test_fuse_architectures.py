"""Fused folders of mlx-lm's architectures: its own loader, renaming and all, gives equal logits."""

import dataclasses
import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

import workbench as wb
from tests.architecture_settings import COMMON
from tests.architectures import ARCHITECTURES
from tests.toy import VOCAB_SIZE, toy_tokenizer
from workbench.errors import ConfigError, WeightsError
from workbench.models.loading import BaseModel
from workbench.models.report import compare

NAMES = ["qwen3", "phi3", "gemma", "olmo2", "internlm2", "qwen3_moe", "mamba2"]
PROMPT = mx.array([[5, 80, 200, 17, 3, 120]])


def foreign(architecture, folder):
    """A tiny model of mlx-lm's, as `load_model` would return it from a folder."""
    settings = {**architecture.settings, "vocab_size": VOCAB_SIZE}
    architecture = dataclasses.replace(architecture, settings=settings)
    raw_config = {"model_type": architecture.module, **COMMON, **settings}
    model = architecture.build()
    model.eval()
    parameters = dict(tree_flatten(model.parameters()))
    report = compare(parameters, parameters)
    return BaseModel(
        model,
        toy_tokenizer(),
        getattr(model, "args", raw_config),
        report,
        "tiny",
        folder,
        raw_config,
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_of_mlx_lm_is_read_back(tmp_path, name):
    base = foreign(ARCHITECTURES[name], tmp_path / "nowhere")
    plain = base.model(PROMPT)
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    base.model.update(tree_map(lambda a: a + 0.1, base.model.trainable_parameters()))
    fused = wb.fuse(base, tmp_path / "fused")
    assert fused.tools == ("mlx-lm",)
    expected = base.model(PROMPT)
    gap = mx.abs(wb.load_model(fused, dtype=mx.float32).model(PROMPT) - expected).max()
    assert gap <= 1e-5 * mx.abs(expected).max()
    assert mx.abs(expected - plain).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_it_is_quantised_as_mlx_does_it(tmp_path, name):
    base = foreign(ARCHITECTURES[name], tmp_path / "nowhere")
    fused = wb.fuse(base, tmp_path / "fused", quantise={"bits": 8, "group_size": 32})
    back = wb.load_model(fused, dtype=mx.float32).model(PROMPT)

    def fits(path, module):
        is_gate = path.endswith("mlp.gate")  # mlx-lm wants groups of 64 there; this one has 32
        fits_groups = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return fits_groups and not is_gate

    nn.quantize(base.model, group_size=32, bits=8, class_predicate=fits)
    assert mx.allclose(back, base.model(PROMPT), rtol=1e-5, atol=1e-5)


def test_a_layers_own_settings_are_written_whole(tmp_path):
    base = foreign(ARCHITECTURES["rwkv7"], tmp_path / "nowhere")
    expected = base.model(PROMPT)
    fused = wb.fuse(base, tmp_path / "fused", quantise={"bits": 8, "group_size": 32})
    quantization = json.loads((tmp_path / "fused/config.json").read_text())["quantization"]
    whole = {"bits": 8, "group_size": 32, "mode": "affine"}  # its predicate says the bits only
    assert quantization == {**whole, "model.embeddings": whole}
    gap = mx.abs(wb.load_model(fused, dtype=mx.float32).model(PROMPT) - expected).max()
    assert 0 < gap < 0.1 * mx.abs(expected).max()


def test_a_weight_that_mlx_lm_changes_as_it_reads_it_is_refused(tmp_path):
    base = foreign(ARCHITECTURES["baichuan_m1"], tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"would change lm_head\.weight by \d+\.\d+%.*quantise="):
        wb.fuse(base, tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []
    base.model.lm_head.weight /= mx.linalg.norm(base.model.lm_head.weight, axis=-1, keepdims=True)
    expected = base.model(PROMPT)  # as mlx-lm reads a checkpoint of it
    back = wb.load_model(wb.fuse(base, tmp_path / "fused"), dtype=mx.float32)
    assert mx.allclose(back.model(PROMPT), expected, rtol=1e-5, atol=1e-5)
    wb.fuse(base, tmp_path / "half", dtype=mx.bfloat16)  # lengths of one, but for rounding
    settings = {"bits": 4, "group_size": 32}
    four = wb.load_model(wb.fuse(base, tmp_path / "four", quantise=settings), dtype=mx.float32)
    with pytest.raises(WeightsError, match=r"would change lm_head\.weight"):
        wb.fuse(four, tmp_path / "plain")
    eight = wb.fuse(four, tmp_path / "eight", quantise={"bits": 8, "group_size": 32})
    logits = four.model(PROMPT)
    gap = mx.abs(wb.load_model(eight, dtype=mx.float32).model(PROMPT) - logits).max()
    assert gap < 0.03 * mx.abs(logits).max()


def test_peft_wants_the_names_of_the_models_own_files(tmp_path):
    wb.fuse(foreign(ARCHITECTURES["qwen3"], tmp_path / "nowhere"), tmp_path / "model")
    base = wb.load_model(tmp_path / "model")
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    wb.save_adapter(base, tmp_path / "adapter", format="peft")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"]
    base.path = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="not named or laid out so"):
        wb.save_adapter(base, tmp_path / "other", format="peft")
