"""GGUF files that we write: read back here and by the gguf package."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGUFReader, TokenType
from tokenizers import normalizers

import workbench as wb
from tests.process import run
from tests.toy import toy_base
from tests.toy_adapters import CONFIG, TOKENS, randomise
from tests.toy_folders import weights_of
from tests.toy_gguf import trained_tokenizer, write_toy_gguf
from workbench.errors import ConfigError, RunError, TokenizerError, WeightsError
from workbench.export.gguf import export_gguf
from workbench.export.weights import fused_weights
from workbench.models.gguf_format import GGUFFile

ADAPTED = "model.layers.1.self_attn.q_proj.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"head_dim": 16, "num_key_value_heads": 1},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
]


WORDS = trained_tokenizer()  # with merges, as every real one has


def toy(extra=0, **changes):
    """A toy with such a tokenizer, and some rows of the embedding more."""
    base = toy_base(vocab_size=len(WORDS) + extra, **changes)
    base.tokenizer = trained_tokenizer()
    return base


def toy_with_adapter():
    """A toy with an adapter that has moved."""
    base = toy()
    base.model.eval()
    wb.add_lora(base.model, CONFIG)
    randomise(base.model)
    return base


def largest(one, other):
    """Largest difference of two networks' logits."""
    return mx.abs(one.model(TOKENS) - other.model(TOKENS)).max().item()


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_what_is_written_is_read_back_with_equal_logits(tmp_path, changes):
    base = toy(**changes)
    for module in base.model.modules():  # numbers that 16 bits hold exactly
        for name in ("weight", "bias"):
            if name in module:
                module[name] = module[name].astype(mx.float16).astype(mx.float32)
    export = export_gguf(base, tmp_path / "toy.gguf")
    back = wb.load_model(export, dtype=mx.float32)
    assert largest(back, base) <= 1e-5 * mx.abs(base.model(TOKENS)).max().item()
    for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta"):
        assert getattr(back.config, name) == getattr(base.config, name), name
    text = "The capital: São Paulo 1234<|im_end|>"
    assert back.tokenizer.encode(text) == base.tokenizer.encode(text)
    assert back.tokenizer.chat_template == base.tokenizer.chat_template
    assert back.eos_token_ids == base.eos_token_ids


@pytest.mark.parametrize(("kind", "step"), [("f16", 2**-11), ("q8_0", 1 / 220)])
def test_the_adapter_is_in_it_up_to_rounding(tmp_path, kind, step):
    base = toy_with_adapter()
    back = wb.load_model(export_gguf(base, tmp_path / "toy.gguf", kind), dtype=mx.float32)
    fused, plain = fused_weights(base.model), weights_of(toy().model)
    written = weights_of(back.model)
    assert written.keys() == fused.keys()
    for name, array in fused.items():
        allowed = step * mx.abs(array).max(axis=-1, keepdims=True)
        assert (mx.abs(written[name] - array) <= allowed).all(), name
    assert mx.abs(written[ADAPTED] - plain[ADAPTED]).max() > 0.1


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 4, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_a_base_quantised_in_any_mode_is_written_as_numbers(tmp_path, mode, bits, group_size):
    base = toy()
    nn.quantize(base.model, group_size=group_size, bits=bits, mode=mode)
    plain = base.model(TOKENS)
    wb.add_lora(base.model, CONFIG)
    base.model.eval()
    randomise(base.model)
    expected = base.model(TOKENS)
    back = wb.load_model(export_gguf(base, tmp_path / "toy.gguf"), dtype=mx.float32)
    assert mx.abs(expected - plain).max() > 0.1
    assert largest(back, base) <= 1e-2 * mx.abs(expected).max().item()


def test_bytes_are_those_of_the_test_writer(tmp_path):
    base = toy()
    theirs = write_toy_gguf(tmp_path / "theirs.gguf", base.model, base.tokenizer, "F16")
    ours = export_gguf(base, tmp_path / "ours.gguf").path
    one, other = GGUFFile(ours), GGUFFile(theirs)
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert np.array_equal(one.read(name), other.read(name)), name
    for key, value in other.metadata.items():
        assert one.metadata[key] == value, key


def test_the_gguf_reader_finds_what_llama_cpp_needs(tmp_path):
    path = export_gguf(toy(extra=3), tmp_path / "toy.gguf", "q8_0").path
    reader = GGUFReader(path)
    value = {key: field.contents() for key, field in reader.fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["general.file_type"] == 7
    assert value["llama.attention.head_count_kv"] == 2
    assert value["llama.rope.dimension_count"] == 8
    assert value["tokenizer.ggml.model"] == "gpt2"
    assert value["tokenizer.ggml.pre"] == "smollm"
    assert value["tokenizer.ggml.eos_token_id"] == 2
    assert value["tokenizer.ggml.add_bos_token"] is False
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    assert tokens[-3:] == [f"[PAD{len(WORDS) + n}]" for n in range(3)]
    assert types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert types[-1] == TokenType.UNUSED
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_blocks_do_not_divide_are_kept_in_16_bits(tmp_path):
    base = toy(intermediate_size=48)
    kinds = {
        n: t.kind.name
        for n, t in GGUFFile(export_gguf(base, tmp_path / "a.gguf", "q8_0").path).tensors.items()
    }
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def with_a_normalizer():
    base = toy()
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return base


def too_large():
    base = toy()
    base.model.layers[0].mlp.up_proj.weight *= 1e6
    return base


def not_a_number():
    base = toy()
    base.model.layers[0].input_layernorm.weight *= float("nan")
    return base


def foreign():
    from mlx_lm.models import llama

    base = toy()
    base.model = llama.Model(llama.ModelArgs.from_dict(base.raw_config))
    return base


@pytest.mark.parametrize(
    ("make", "settings", "kind", "match"),
    [
        (with_a_normalizer, {}, TokenizerError, "has no name in llama.cpp"),
        (toy_base, {}, TokenizerError, "has no merges"),
        (too_large, {}, WeightsError, r"layers\.0\.mlp\.up_proj\.weight holds .* for F16"),
        (not_a_number, {}, WeightsError, r"layers\.0\.input_layernorm\.weight holds NaN"),
        (foreign, {}, ConfigError, "cannot be written"),
        (toy, {"kind": "q4_k"}, ConfigError, "unknown kind 'q4_k'"),
        (toy, {"run_dir": "nowhere"}, RunError, "holds no run"),
        (toy, {"path": "toy.bin"}, ConfigError, "must end in .gguf"),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, make, settings, kind, match):
    path = tmp_path / settings.pop("path", "toy.gguf")
    with pytest.raises(kind, match=match):
        export_gguf(make(), path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path):
    (tmp_path / "toy.gguf").write_text("mine")
    (tmp_path / "README.md").write_text("mine, too")
    with pytest.raises(ConfigError, match="is there already"):
        export_gguf(toy(), tmp_path / "toy.gguf")
    assert (tmp_path / "toy.gguf").read_text() == "mine"
    export = export_gguf(toy(), tmp_path / "toy.gguf", force=True)
    assert export.card is None
    assert (tmp_path / "README.md").read_text() == "mine, too"
    base = wb.load_model(export)
    with pytest.raises(ConfigError, match="base model's own file"):
        export_gguf(base, tmp_path / "toy.gguf", force=True)


def test_a_full_disk_leaves_nothing(tmp_path):
    finished = run(f"""
        import resource, signal
        import workbench as wb
        from tests.test_gguf_export import toy
        from workbench.errors import FileFormatError
        base = toy()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        try:
            wb.export_gguf(base, {str(tmp_path / "toy.gguf")!r})
        except FileFormatError as error:
            print(error)
    """)
    assert "cannot be written" in finished.out, finished.err
    assert list(tmp_path.iterdir()) == []
