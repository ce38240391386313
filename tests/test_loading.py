"""Files become a network: every kind of source, a report of every tensor, loud about any misfit."""

import itertools
import json
import math

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import regex
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gpt2, qwen2
from mlx_lm.utils import quantize_model, save

import workbench as wb
from tests.test_layers import LLAMA3, close
from tests.toy import TOY_CONFIG, VOCAB_SIZE, save_toy_folder, toy_model, toy_tokenizer
from tests.toy_gguf import trained_tokenizer, write_toy_gguf
from workbench.errors import (
    ConfigError,
    FileFormatError,
    SourceError,
    TokenizerError,
    WeightsError,
)
from workbench.models.files import INDEX_NAME, read_safetensors, write_safetensors
from workbench.models.gguf_format import GGUFFile
from workbench.models.llama import Llama
from workbench.models.loading import embedding_rows
from workbench.models.report import compare
from workbench.models.rope import rope_periods

TOKENS = mx.array([[5, 80, 200, 17, 3, 120], [9, 9, 1, 44, 258, 2]])
A_WEIGHT = "model.layers.1.mlp.up_proj.weight"
GGUF_VOCAB = {"vocab_size": 320}


def weights_of(model):
    """Parameters by name."""
    return dict(tree_flatten(model.parameters()))


def equal_bits(a, b):
    """Whether two sets of tensors agree in names, dtypes and every bit."""
    a, b = dict(a), dict(b)
    same = a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    return same and all(mx.array_equal(a[name], b[name], equal_nan=True).item() for name in a)


def rewrite(folder, change):
    """Change the tensors of a model folder in place."""
    tensors = read_safetensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def reconfigure(folder, **changes):
    """Change a folder's config.json; None removes a key."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder):
    """Split a folder's weights into two shards with an index."""
    tensors = sorted(read_safetensors(folder / "model.safetensors").items())
    weight_map = {}
    for number, part in enumerate((tensors[:7], tensors[7:])):
        name = f"model-{number}.safetensors"
        write_safetensors(folder / name, dict(part))
        weight_map.update(dict.fromkeys(dict(part), name))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


# Folders


def test_a_folder_loads_bit_for_bit(model_folder):
    base = wb.load_model(model_folder)
    assert equal_bits(weights_of(base.model), weights_of(toy_model()))
    assert base.report.complete
    assert len(base.report.loaded) == len(weights_of(base.model))
    assert base.report.total_bytes == sum(w.nbytes for w in weights_of(base.model).values())
    assert base.config.hidden_size == TOY_CONFIG["hidden_size"]
    assert base.tokenizer.decode(base.tokenizer("héllo")["input_ids"]) == "héllo"
    assert base.eos_token_ids == {2}


def test_a_sharded_folder_equals_the_single_file(model_folder):
    single = wb.load_model(model_folder)
    shard(model_folder)
    assert equal_bits(weights_of(wb.load_model(model_folder).model), weights_of(single.model))


def test_loading_twice_gives_two_equal_and_separate_models(model_folder):
    first, second = wb.load_model(model_folder), wb.load_model(model_folder)
    first.model.model.norm.weight = first.model.model.norm.weight + 1
    assert equal_bits(weights_of(second.model), weights_of(toy_model()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_the_dtype_option_decides_the_dtype_in_memory(model_folder, dtype):
    rewrite(model_folder, lambda t: t.update({k: v.astype(mx.bfloat16) for k, v in t.items()}))
    base = wb.load_model(model_folder, dtype=dtype)
    assert {w.dtype for w in weights_of(base.model).values()} == {dtype}
    assert set(base.report.table()["file_dtype"]) == {"bfloat16"}
    name = str(dtype).removeprefix("mlx.core.")
    assert set(base.report.table()["dtype"]) == {name}


def test_a_bfloat16_folder_keeps_its_numbers_in_float32(model_folder):
    rounded = {k: v.astype(mx.bfloat16) for k, v in weights_of(toy_model()).items()}
    rewrite(model_folder, lambda t: t.update(rounded))
    loaded = weights_of(wb.load_model(model_folder, dtype=mx.float32).model)
    assert equal_bits(loaded, {k: v.astype(mx.float32) for k, v in rounded.items()})


def test_a_dtype_that_is_no_float_raises(model_folder):
    with pytest.raises(ConfigError, match="dtype must be a floating-point type"):
        wb.load_model(model_folder, dtype=mx.int32)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_quantised_by_mlx_lm_gives_mlx_lms_logits(model_folder, bits):
    model, config = mlx_lm.utils.load_model(model_folder)
    model, config = quantize_model(model, config, group_size=32, bits=bits)
    mlx_lm.utils.save_model(model_folder, model)
    mlx_lm.utils.save_config(config, model_folder / "config.json")
    base = wb.load_model(model_folder, dtype=mx.float32)
    assert base.report.complete
    assert close(base.model(TOKENS), model(TOKENS), 1e-4)
    assert not close(base.model(TOKENS), toy_model()(TOKENS), 1e-4)


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


# Misfits


def test_a_missing_tensor_is_named(model_folder):
    rewrite(model_folder, lambda tensors: tensors.pop(A_WEIGHT))
    with pytest.raises(WeightsError, match=f"1 missing: {A_WEIGHT}"):
        wb.load_model(model_folder)


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


def test_a_tied_folder_may_store_the_head_twice(model_folder):
    embedding = toy_model().model.embed_tokens.weight
    rewrite(model_folder, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert wb.load_model(model_folder).report.names("ignored") == ["lm_head.weight"]


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


def test_an_embedding_larger_than_the_tokenizer_is_fine(tmp_path):
    folder = save_toy_folder(tmp_path / "m", vocab_size=VOCAB_SIZE + 61)
    assert embedding_rows(wb.load_model(folder).model, None) == VOCAB_SIZE + 61


def test_another_tokenizer_can_be_given(tmp_path, model_folder):
    other = toy_tokenizer()
    other.add_special_tokens({"eos_token": "<|endoftext|>"})
    other.save_pretrained(tmp_path / "other")
    base = wb.load_model(model_folder, tokenizer=tmp_path / "other")
    assert base.tokenizer.eos_token_id == 0
    assert base.eos_token_ids == {0, 2}


# GGUF


def toy_gguf(path, model=None, tokenizer=None, **options):
    """A GGUF file of a toy Llama."""
    model = model or toy_model(**GGUF_VOCAB)
    return write_toy_gguf(path, model, tokenizer or trained_tokenizer(), **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_a_llama_comes_back_from_gguf(tmp_path, changes):
    model = toy_model(**GGUF_VOCAB, **changes)
    base = wb.load_model(toy_gguf(tmp_path / "x.gguf", model), dtype=mx.float32)
    assert base.report.complete
    assert equal_bits(weights_of(base.model), weights_of(model))
    assert mx.array_equal(base.model(TOKENS), model(TOKENS))
    assert base.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_llama3_rope_comes_back_from_ggufs_factors(tmp_path):
    model = toy_model(**GGUF_VOCAB, rope_theta=5e5, rope_scaling=LLAMA3)
    factors = np.array(rope_periods(8, 5e5, LLAMA3)[0] / rope_periods(8, 5e5, None)[0])
    base = wb.load_model(toy_gguf(tmp_path / "x.gguf", model, factors=factors), dtype=mx.float32)
    assert close(base.model(TOKENS), model(TOKENS))
    assert close(base.model.layers[0].self_attn.rope.periods, rope_periods(8, 5e5, LLAMA3)[0])


def test_linear_rope_comes_back_from_gguf(tmp_path):
    model = toy_model(**GGUF_VOCAB, rope_scaling={"type": "linear", "factor": 4.0})
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    base = wb.load_model(toy_gguf(tmp_path / "x.gguf", model, metadata=scaling), dtype=mx.float32)
    assert close(base.model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_gguf_gives_the_dequantised_numbers(tmp_path, kind):
    path = toy_gguf(tmp_path / "x.gguf", kind=kind)
    base = wb.load_model(path, dtype=mx.float32)
    weight = base.model.layers[0].mlp.down_proj.weight
    assert np.array_equal(weight, GGUFFile(path).read("blk.0.ffn_down.weight").astype(np.float32))
    assert kind in set(base.report.table()["file_dtype"])


@pytest.mark.parametrize(
    ("metadata", "factors", "named"),
    [
        ({"llama.embedding_length": None}, None, "missing hidden_size"),
        ({"llama.attention.head_count": 7}, None, "do not make 7 heads"),
        ({"llama.attention.head_count": "4"}, None, "do not make '4' heads"),
        ({"llama.rope.dimension_count": 4}, None, "rotates only 4"),
        ({"llama.rope.scaling.type": "yarn"}, None, "'yarn' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, None, "factor must be"),
        ({"llama.rope.freq_base": "x"}, np.ones(4), "malformed RoPE"),
        ({}, np.array([1, 2, 3, 4]), "not Llama 3's"),
        ({}, np.full(4, np.nan), "factor must be"),
        ({}, np.ones((2, 2)), "malformed RoPE"),
    ],
)
def test_a_gguf_with_impossible_numbers_raises(tmp_path, metadata, factors, named):
    path = toy_gguf(tmp_path / "x.gguf", metadata=metadata, factors=factors)
    with pytest.raises(ConfigError, match=named):
        wb.load_model(path)


def test_a_gguf_of_another_architecture_raises(tmp_path):
    path = toy_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(ConfigError, match="architecture 'bloom' cannot be read from GGUF"):
        wb.load_model(path)


def test_a_gguf_with_another_kind_of_tokenizer_raises_with_the_cure(tmp_path):
    path = toy_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"smollm", b"abcdef"))
    with pytest.raises(TokenizerError, match=r"'abcdef'.*Pass tokenizer="):
        wb.load_model(path)
    trained_tokenizer().save_pretrained(tmp_path / "words")
    assert wb.load_model(path, tokenizer=tmp_path / "words").tokenizer.eos_token_id == 2


TEXTS = [
    "The capital of Peru is Lima.",
    "1889: 3,250 × 007 = 22750",
    "São Paulo, Curaçao, Zürich, naïve café",
    "東京は日本の首都です。北京 서울",
    "🎉👩‍👩‍👧 flags 🇵🇪!",
    "def f(x):\n\treturn  x  ** 2\n\n\n",
    "  leading, trailing  ",
    "<|im_start|>user\nHi<|im_end|>\n",
    "it's we'll I'M don't",
    "",
]


def reference_ids(text, vocab, merges, special):
    """Byte-level BPE (GPT-2's encoder.py), with single digits split off and specials cut out."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    rank = {tuple(pair): number for number, pair in enumerate(merges)}
    ids = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            ids.append(vocab[part])
            continue
        pieces = [piece for piece in regex.split(r"(\p{N})", part) if piece]
        for word in (word for piece in pieces for word in regex.findall(words, piece)):
            symbols = [letters[byte] for byte in word.encode()]
            while pairs := [pair for pair in itertools.pairwise(symbols) if pair in rank]:
                first = min(pairs, key=rank.get)
                merged, at = [], 0
                while at < len(symbols):
                    both = tuple(symbols[at : at + 2]) == first
                    merged.append("".join(first) if both else symbols[at])
                    at += 2 if both else 1
                symbols = merged
            ids.extend(vocab[symbol] for symbol in symbols)
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_real_tokenizer_equals_a_plain_byte_level_bpe(smollm2, text):
    metadata = GGUFFile(smollm2.path).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    special = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == 3]
    ids = smollm2.tokenizer(text)["input_ids"]
    assert ids == reference_ids(text, vocab, merges, special)
    assert smollm2.tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_comes_back_from_gguf(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "tokenizer.gguf"
    ours = wb.load_model(path if path.exists() else toy_gguf(path)).tokenizer
    assert ours(text)["input_ids"] == trained_tokenizer()(text)["input_ids"]
    chat = [{"role": "user", "content": text}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(chat, **options) == trained_tokenizer().apply_chat_template(
        chat, **options
    )


def test_the_real_model_is_complete_and_as_published(smollm2):
    assert smollm2.report.complete
    assert len(smollm2.report.loaded) == 30 * 9 + 2
    parameters = sum(w.size for w in weights_of(smollm2.model).values())
    assert parameters == 134_515_008
    assert smollm2.report.total_bytes == 4 * parameters
    assert smollm2.eos_token_ids == {2}


# Other architectures, through mlx-lm


def foreign_folder(folder, module, config):
    """A folder of another architecture, with random weights and the toy tokenizer."""
    model = module.Model(module.ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(3), 200))
    model.update(
        tree_map(lambda p: 0.2 * mx.random.normal(p.shape, key=next(keys)), model.parameters())
    )
    toy_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", weights_of(model))
    return folder


QWEN2 = {**TOY_CONFIG, "model_type": "qwen2"}
GPT2 = {
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": VOCAB_SIZE,
}


@pytest.mark.parametrize(
    ("module", "config"), [(qwen2, QWEN2), (gpt2, GPT2)], ids=["qwen2", "gpt2"]
)
def test_another_architecture_gives_mlx_lms_logits(tmp_path, module, config):
    folder = foreign_folder(tmp_path, module, config)
    base = wb.load_model(folder)
    theirs, _ = mlx_lm.load(str(folder))
    assert not isinstance(base.model, Llama)
    assert mx.array_equal(base.model(TOKENS), theirs(TOKENS))
    assert base.report.complete
    assert set(base.report.loaded) == set(weights_of(theirs))
    assert base.config.vocab_size == VOCAB_SIZE


def test_another_architecture_quantised_by_mlx_lm_loads(tmp_path):
    folder = foreign_folder(tmp_path, qwen2, QWEN2)
    model, tokenizer, config = mlx_lm.load(str(folder), return_config=True)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save(tmp_path / "q", folder, model, tokenizer, config)
    base, (theirs, _) = wb.load_model(tmp_path / "q"), mlx_lm.load(str(tmp_path / "q"))
    assert base.report.complete
    assert mx.array_equal(base.model(TOKENS), theirs(TOKENS))


def test_a_missing_tensor_of_another_architecture_is_named(tmp_path):
    folder = foreign_folder(tmp_path, qwen2, QWEN2)
    rewrite(folder, lambda tensors: tensors.pop(A_WEIGHT))
    with pytest.raises(WeightsError, match=f"1 missing: {A_WEIGHT}"):
        wb.load_model(folder)


def test_code_in_a_model_folder_is_not_run(model_folder):
    (model_folder / "evil.py").write_text("raise SystemExit('ran')")
    reconfigure(model_folder, model_type="evil", model_file="evil.py")
    with pytest.raises(ConfigError, match="evil"):
        wb.load_model(model_folder)


# The report


def test_the_report_escapes_a_hostile_tensor_name(model_folder):
    hostile = "<img src=x onerror=alert(1)>"
    rewrite(model_folder, lambda tensors: tensors.update({hostile: mx.ones(1)}))
    report = wb.load_model(model_folder, strict=False).report
    assert hostile in report.unexpected
    page = report._repr_html_()
    assert "<img" not in page
    assert "&lt;img src=x" in page


def test_the_report_escapes_its_notes():
    page = compare({}, {}, notes=["<script>alert(1)</script>"])._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_reports_table_has_shape_dtype_and_bytes_of_every_tensor():
    model = toy_model()
    table = compare(weights_of(model), weights_of(model)).table()
    assert list(table["name"]) == list(weights_of(model))
    expected = [math.prod(shape) * 4 for shape in table["file_shape"]]
    assert list(table["num_bytes"]) == expected


# save_weights and load_weights (R2)


@pytest.fixture
def saved(tmp_path):
    """A model and the file of its weights."""
    model, path = toy_model(seed=5, tie_word_embeddings=False), tmp_path / "w.safetensors"
    wb.save_weights(model, path)
    return model, path


def test_save_writes_every_parameter_by_name(saved):
    model, path = saved
    assert equal_bits(read_safetensors(path), weights_of(model))


def test_load_fills_every_parameter(saved):
    model, path = saved
    other = toy_model(seed=6, tie_word_embeddings=False)
    report = wb.load_weights(other, path)
    assert report.complete
    assert len(report.loaded) == len(weights_of(model))
    assert mx.array_equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_a_round_trip_is_bit_equal(tmp_path, dtype):
    model, other = toy_model(seed=5), toy_model(seed=6)
    model.set_dtype(dtype)
    other.set_dtype(dtype)
    wb.save_weights(model, tmp_path / "w.safetensors")
    wb.load_weights(other, tmp_path / "w.safetensors")
    assert equal_bits(weights_of(other), weights_of(model))


def test_saving_and_loading_leave_the_saved_model_as_it_was(saved):
    model, path = saved
    wb.load_weights(model, path)
    assert equal_bits(weights_of(model), weights_of(toy_model(seed=5, tie_word_embeddings=False)))


def test_the_metadata_says_who_wrote_the_file(saved):
    _, metadata = mx.load(str(saved[1]), return_metadata=True)
    assert metadata["format"] == "mlx"


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_corrupted_file_raises_and_changes_nothing(saved, keep):
    model, path = saved
    before = {name: mx.array(w) for name, w in weights_of(model).items()}
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"w\.safetensors"):
        wb.load_weights(model, path)
    assert equal_bits(weights_of(model), before)


@pytest.mark.parametrize(
    ("changes", "dtype", "named"),
    [
        ({"num_hidden_layers": 3}, mx.float32, "9 missing"),
        ({"num_hidden_layers": 1}, mx.float32, "9 unexpected"),
        ({"vocab_size": 300}, mx.float32, "wrong shape: model.embed_tokens.weight"),
        ({}, mx.bfloat16, "wrong dtype: .*float32"),
    ],
)
def test_weights_of_another_model_raise_and_change_nothing(saved, changes, dtype, named):
    other = toy_model(seed=6, tie_word_embeddings=False, **changes)
    other.set_dtype(dtype)
    before = weights_of(other)
    with pytest.raises(WeightsError, match=named):
        wb.load_weights(other, saved[1])
    assert equal_bits(weights_of(other), before)
