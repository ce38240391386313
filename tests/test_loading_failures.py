"""A folder that does not fit its network is refused: each misfit is named, with the cure."""

import mlx.core as mx
import mlx.nn as nn
import pytest

import workbench as wb
from tests.toy import VOCAB_SIZE, save_toy_folder, toy_model
from tests.toy_folders import A_WEIGHT, reconfigure, rewrite, weights_of
from workbench.errors import (
    ConfigError,
    FileFormatError,
    SourceError,
    TokenizerError,
    WeightsError,
)


def test_a_dtype_that_is_no_float_raises(model_folder):
    for dtype in (mx.int32, "float16"):
        with pytest.raises(ConfigError, match="dtype must be a floating-point type"):
            wb.load_model(model_folder, dtype=dtype)


def test_a_quantised_folder_without_its_numbers_raises(model_folder):
    quantised = nn.QuantizedLinear.from_linear(toy_model().layers[1].mlp.up_proj, 32, 4)
    parts = {f"{A_WEIGHT.removesuffix('weight')}{k}": v for k, v in quantised.parameters().items()}
    rewrite(model_folder, lambda t: t.update(parts))
    reconfigure(model_folder, quantization={"bits": 4})
    with pytest.raises(ConfigError, match="group_size and bits"):
        wb.load_model(model_folder)
    reconfigure(model_folder, quantization={"bits": 8, "group_size": 32})
    with pytest.raises(FileFormatError, match=A_WEIGHT):
        wb.load_model(model_folder, dtype=mx.float32)


def test_a_missing_tensor_is_named(model_folder):
    rewrite(model_folder, lambda tensors: tensors.pop(A_WEIGHT))
    with pytest.raises(WeightsError, match=f"1 missing: {A_WEIGHT}"):
        wb.load_model(model_folder)


def test_only_weights_that_fit_are_read_beside_the_tokenizer(model_folder, monkeypatch):
    read = []
    monkeypatch.setattr(mx, "async_eval", lambda *trees: read.append(len(trees)))
    wb.load_model(model_folder)
    assert read == [1]
    rewrite(model_folder, lambda tensors: tensors.pop(A_WEIGHT))
    with pytest.raises(WeightsError):
        wb.load_model(model_folder)
    assert read == [1]


def test_an_extra_tensor_is_named(model_folder):
    rewrite(model_folder, lambda tensors: tensors.update({"model.extra.bias": mx.ones(3)}))
    with pytest.raises(WeightsError, match=r"1 unexpected: model\.extra\.bias"):
        wb.load_model(model_folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(model_folder):
    rewrite(model_folder, lambda tensors: tensors.update({A_WEIGHT: mx.ones((32, 64))}))
    with pytest.raises(WeightsError, match=rf"wrong shape: {A_WEIGHT} .*\(32, 64\).*\(64, 32\)"):
        wb.load_model(model_folder)


def test_a_tensor_of_integers_is_named(model_folder):
    integers = mx.ones((64, 32), dtype=mx.int32)
    rewrite(model_folder, lambda tensors: tensors.update({A_WEIGHT: integers}))
    with pytest.raises(WeightsError, match=rf"wrong dtype: {A_WEIGHT} \(int32\)"):
        wb.load_model(model_folder)


def test_a_renamed_part_is_both_missing_and_unexpected(model_folder):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("self_attn", "attention")] = tensors.pop(name)

    rewrite(model_folder, rename)
    with pytest.raises(WeightsError, match=r"8 missing: .*self_attn.*8 unexpected: .*attention"):
        wb.load_model(model_folder)


def test_not_strict_reports_every_misfit(model_folder):
    def damage(tensors):
        tensors.pop("model.norm.weight")
        tensors.update({A_WEIGHT: mx.ones((3,)), "extra": mx.ones(1)})

    rewrite(model_folder, damage)
    report = wb.load_model(model_folder, strict=False).report
    assert not report.complete
    assert report.missing == ["model.norm.weight"]
    assert report.unexpected == ["extra"]
    assert report.mismatched == [A_WEIGHT]
    assert len(report.loaded) == len(weights_of(toy_model())) - 2
    assert "NOT complete" in str(report)


def test_biases_that_the_file_lacks_raise(model_folder):
    reconfigure(model_folder, attention_bias=True)
    with pytest.raises(WeightsError, match=r"8 missing: .*q_proj\.bias"):
        wb.load_model(model_folder)


def test_a_head_that_differs_from_the_tied_embedding_raises(model_folder):
    own = toy_model().model.embed_tokens.weight + 1
    rewrite(model_folder, lambda tensors: tensors.update({"lm_head.weight": own}))
    with pytest.raises(WeightsError, match=r"unexpected: lm_head\.weight"):
        wb.load_model(model_folder)


def test_an_untied_folder_without_a_head_raises(model_folder):
    reconfigure(model_folder, tie_word_embeddings=False)
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        wb.load_model(model_folder)


def test_a_folder_without_a_config_raises_with_the_cure(model_folder):
    (model_folder / "config.json").unlink()
    with pytest.raises(
        SourceError, match=r"toy-model: holds no config\.json\. Give a model folder"
    ):
        wb.load_model(model_folder)


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "vocab_size"])
def test_a_config_without_a_needed_key_raises(model_folder, key):
    reconfigure(model_folder, **{key: None})
    with pytest.raises(ConfigError, match=rf"config\.json: missing {key}"):
        wb.load_model(model_folder)


def test_an_unknown_architecture_raises_and_is_named(model_folder):
    reconfigure(model_folder, model_type="never_heard_of")
    with pytest.raises(ConfigError, match="never_heard_of"):
        wb.load_model(model_folder)


def test_code_in_a_model_folder_is_not_run(model_folder):
    (model_folder / "evil.py").write_text("raise SystemExit('ran')")
    reconfigure(model_folder, model_type="evil", model_file="evil.py")
    with pytest.raises(ConfigError, match="evil"):
        wb.load_model(model_folder)


# Tokenizers


def test_a_missing_tokenizer_raises_with_the_cure(model_folder):
    for path in model_folder.glob("*token*"):
        path.unlink()
    with pytest.raises(TokenizerError, match="toy-model"):
        wb.load_model(model_folder)


def test_a_broken_tokenizer_raises(model_folder):
    (model_folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "no"}}')
    with pytest.raises(TokenizerError, match="toy-model: holds no readable tokenizer"):
        wb.load_model(model_folder)


def test_a_tokenizer_larger_than_the_embedding_raises(tmp_path):
    folder = save_toy_folder(tmp_path / "m", vocab_size=VOCAB_SIZE - 1)
    with pytest.raises(TokenizerError, match=f"ids up to {VOCAB_SIZE - 1}.* {VOCAB_SIZE - 1} rows"):
        wb.load_model(folder)
