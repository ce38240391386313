"""GGUF files and the folders of other architectures become networks; what does not fit is named."""

import itertools
import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import regex
from mlx.utils import tree_map
from mlx_lm.models import gpt2, qwen2
from mlx_lm.utils import quantize_model, save

import workbench as wb
from tests.test_layers import LLAMA3, close
from tests.toy import TOY_CONFIG, VOCAB_SIZE, save_toy_folder, toy_model, toy_tokenizer
from tests.toy_folders import A_WEIGHT, TOKENS, equal_bits, rewrite, weights_of
from tests.toy_gguf import trained_tokenizer, write_toy_gguf
from workbench.errors import ConfigError, TokenizerError, WeightsError
from workbench.models import loading
from workbench.models.files import write_safetensors
from workbench.models.gguf_format import GGUFFile
from workbench.models.llama import Llama
from workbench.models.rope import rope_periods

GGUF_VOCAB = {"vocab_size": 320}


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


# GGUF's tokenizer


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


def test_what_is_quantised_is_never_whole_in_memory(tmp_path, monkeypatch):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = save_toy_folder(tmp_path / "model", **sizes)
    whole = (folder / "model.safetensors").stat().st_size
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    base = wb.load_model(folder, quantise={"bits": 4})
    assert mx.get_peak_memory() - before < 0.5 * whole
    small = wb.Machine("small", whole // 2)
    monkeypatch.setattr(loading, "machine_memory", lambda: small)
    with pytest.raises(ConfigError, match="bytes of parameters; this machine has"):
        wb.load_model(folder)
    again = wb.load_model(folder, quantise={"bits": 4})
    assert equal_bits(weights_of(again.model), weights_of(base.model))
