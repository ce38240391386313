"""Malformed GGUF: refused by name before MLX or the gguf package sees it."""

import os
import re
import struct

import numpy as np
import pytest

from tests.faults.cases import run_case
from tests.faults.gguf_bytes import Raw, array, pack, text, unpack
from tests.test_gguf_format import MALFORMED, TENSORS
from tests.toy import toy_model
from tests.toy_gguf import trained_tokenizer, write_tensors, write_toy_gguf

CLASS = "malformed GGUF"
READ = "tests.faults.actions:read_gguf"
LOAD = "tests.faults.actions:load"
FUZZ = "tests.faults.fuzz:"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The bytes of a file with two tensors and some metadata."""
    return write_tensors(tmp_path_factory.mktemp("gguf") / "x.gguf", TENSORS).read_bytes()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Metadata and tensors of a toy Llama."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    return unpack(write_toy_gguf(path, toy_model(vocab_size=320), trained_tokenizer()))


def refuse(server, folder, says, action, name="x.gguf"):
    """Run a case that must be refused: the file is named, and what is wrong with it."""
    outcome = run_case(server, CLASS, action, str(folder / name), folder)
    assert outcome.kind == "typed error", outcome
    assert name in outcome.text
    assert re.search(says, outcome.text), outcome.text
    assert len(outcome.text) < 2_000


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_header_is_refused(server, tmp_path, bare, name):
    (tmp_path / "x.gguf").write_bytes(MALFORMED[name](bare))
    refuse(server, tmp_path, "", READ)


ONE = {"a": np.ones((2, 3)), "b": np.ones(8)}
FIRST = {"general.architecture": "llama"}
HOSTILE = {  # metadata and tensors, and what the error says
    "a key of nothing": ({"": 1}, ONE, "impossible name"),
    "a key with NUL": ({"a\0b": 1}, ONE, "impossible name"),
    "a key that colours terminals": ({"\x1b[31m": 1}, ONE, "impossible name"),
    "a tensor of no name": ({}, {"": np.ones(8)}, "impossible name"),
    "a tensor name of two lines": ({}, {"a\nb": np.ones(8)}, "impossible name"),
    "a tensor name of 2000 letters": ({}, {"a" * 2000: np.ones(8)}, "beyond its bounds"),
    "a truth of 2": ({"a": Raw(7, b"\2")}, ONE, "neither 0 nor 1"),
    "truths of 3": ({"a": array(7, b"\0", b"\3")}, ONE, "neither 0 nor 1"),
    "an array in an array": ({"a": array(9, b"")}, ONE, "unsupported type 9"),
    "a value of type 255": ({"a": Raw(255, b"")}, ONE, "unknown type 255"),
    "five dimensions": ({}, {"a": np.ones((1, 1, 1, 1, 8))}, "has 5 dimensions"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_field_is_refused(server, tmp_path, name):
    metadata, tensors, says = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(pack({**FIRST, **metadata}, tensors))
    refuse(server, tmp_path, says, READ)


def test_what_stands_behind_the_last_tensor_is_refused(server, tmp_path):
    (tmp_path / "x.gguf").write_bytes(pack(FIRST, ONE) + bytes(32))
    refuse(server, tmp_path, "32 bytes after its last tensor", READ)


def test_a_hole_between_tensors_is_refused(server, tmp_path):
    content = bytearray(pack(FIRST, ONE))
    at = content.index(text("b")) + len(text("b")) + 4 + 8 + 4
    struct.pack_into("<Q", content, at, 64)
    (tmp_path / "x.gguf").write_bytes(content + bytes(32))
    refuse(server, tmp_path, "'b' is not where the one before it ends", READ)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_refused(server, tmp_path, make):
    make(tmp_path / "x.gguf")
    refuse(server, tmp_path, "not a regular file", READ)
    refuse(server, tmp_path, "unknown model|holds no config", LOAD)


# Whole files that describe no model


def floats(count):
    return array(6, *[struct.pack("<f", 1.0)] * count)


MISFITS = {  # metadata that replaces the valid one, and what the error says
    "another architecture": ({"general.architecture": "mamba"}, "architecture 'mamba'"),
    "an architecture that is a list": ({"general.architecture": ["llama"]}, "one number or word"),
    "an architecture that is a number": ({"general.architecture": 7}, "architecture 7"),
    "a negative number of layers": ({"llama.block_count": -1}, "num_hidden_layers"),
    "no layers": ({"llama.block_count": 0}, "num_hidden_layers"),
    "a billion layers": ({"llama.block_count": 10**9}, "num_hidden_layers"),
    "more layers than tensors": ({"llama.block_count": 3}, "9 missing: model.layers.2"),
    "layers in a list": ({"llama.block_count": [2, 2]}, "one number or word"),
    "layers as a text": ({"llama.block_count": "2"}, "num_hidden_layers"),
    "layers as a truth": ({"llama.block_count": True}, "num_hidden_layers"),
    "a width of 2 ** 63": ({"llama.embedding_length": 2**63}, "hidden_size"),
    "a width of another model": ({"llama.embedding_length": 64}, "wrong shape"),
    "no heads": ({"llama.attention.head_count": 0}, "do not make 0 heads"),
    "a billion heads": ({"llama.attention.head_count": 10**9}, "do not make 1000000000 heads"),
    "heads that share nothing": ({"llama.attention.head_count_kv": 3}, "do not make 3 heads"),
    "heads a layer": ({"llama.attention.head_count": [4, 4]}, "one number or word"),
    "a negative width of heads": ({"llama.attention.key_length": -8}, "head_dim"),
    "a huge width of heads": ({"llama.attention.key_length": 2**31}, "head_dim"),
    "a negative context": ({"llama.context_length": -1}, "max_position_embeddings"),
    "an epsilon of NaN": ({"llama.attention.layer_norm_rms_epsilon": np.nan}, "rms_norm_eps"),
    "an epsilon below 0": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps"),
    "a RoPE base of NaN": ({"llama.rope.freq_base": np.nan}, "rope_theta"),
    "a RoPE base of infinity": ({"llama.rope.freq_base": np.inf}, "rope_theta"),
    "a RoPE base of 0": ({"llama.rope.freq_base": 0.0}, "rope_theta"),
    "a RoPE that is a list": ({"llama.rope.scaling.type": ["linear"]}, "one number or word"),
    "a RoPE factor of NaN": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": np.nan},
        "factor must be",
    ),
    "an end token that is a text": ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id"),
    "a negative end token": ({"tokenizer.ggml.eos_token_id": -2}, "eos_token_id"),
    "tokens that are a text": ({"tokenizer.ggml.tokens": "abc"}, "list of texts"),
    "tokens that are numbers": ({"tokenizer.ggml.tokens": [1, 2, 3]}, "list of texts"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "cannot be built"),
    "the same token twice": ({"tokenizer.ggml.tokens": ["a"] * 320}, "a token twice"),
    "tokens of nothing": ({"tokenizer.ggml.tokens": [""]}, "none empty"),
    "merges that are numbers": ({"tokenizer.ggml.merges": [1, 2]}, "list of pairs"),
    "merges of one part": ({"tokenizer.ggml.merges": ["ab"]}, "list of pairs"),
    "merges of unknown tokens": ({"tokenizer.ggml.merges": ["äöü ß"]}, "contradicts itself"),
    "a type for one token": ({"tokenizer.ggml.token_type": [3]}, "one number a token"),
    "types that are a text": ({"tokenizer.ggml.token_type": "333"}, "one number a token"),
    "a template that is a number": ({"tokenizer.chat_template": 7}, "must be a text"),
    "a tokenizer of another kind": ({"tokenizer.ggml.model": "bert"}, "'bert'"),
    "a tokenizer that is a list": ({"tokenizer.ggml.model": ["gpt2"] * 9999}, "cannot be built"),
    "a cut that is a list": ({"tokenizer.ggml.pre": ["smollm"]}, "cannot be built"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_metadata_that_describes_no_model_is_refused(server, tmp_path, parts, name):
    changes, says = MISFITS[name]
    metadata, tensors = parts
    (tmp_path / "x.gguf").write_bytes(pack({**metadata, **changes}, tensors))
    refuse(server, tmp_path, says, LOAD)


def lose(tensors):
    del tensors["blk.1.ffn_up.weight"]


def gain(tensors):
    tensors["blk.7.ffn_up.weight"] = np.ones((64, 32))


def turn(tensors):
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].T


def flatten(tensors):
    tensors["blk.1.attn_q.weight"] = tensors["blk.1.attn_q.weight"].reshape(-1)


def double(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["blk.1.ffn_up.weight"]


def spoil(tensors):
    tensors["output_norm.weight"] = np.full(32, np.nan)


def shrink(tensors):
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:100]


OTHER_TENSORS = {
    lose: r"1 missing: model\.layers\.1\.mlp\.up_proj",
    gain: r"1 unexpected: model\.layers\.7",
    turn: "wrong shape",
    flatten: "wrong shape",
    double: "twice, once as",
    spoil: "NaN or infinity",
    shrink: r"ids up to \d+, but the embedding has 100 rows",
}


@pytest.mark.parametrize("change", OTHER_TENSORS, ids=lambda change: change.__name__)
def test_tensors_of_another_model_are_refused(server, tmp_path, parts, change):
    metadata, tensors = parts
    change(tensors := dict(tensors))
    (tmp_path / "x.gguf").write_bytes(pack(metadata, tensors))
    refuse(server, tmp_path, OTHER_TENSORS[change], LOAD)


def test_what_the_cases_are_made_from_loads(server, tmp_path, parts):
    (tmp_path / "x.gguf").write_bytes(pack(*parts))
    (tmp_path / "link.gguf").symlink_to("x.gguf")
    for name in ("x.gguf", "link.gguf"):
        outcome = run_case(server, CLASS, LOAD, str(tmp_path / name), tmp_path)
        assert outcome.value == {"finite": True, "ends": [2]}, outcome


# Chance


def test_chance_damage_is_refused_or_read_as_the_reference_reads_it(server, tmp_path):
    path = tmp_path / "x.gguf"
    metadata = {**FIRST, "count": 3, "share": 0.5, "on": True, "words": ["one", "two"]}
    path.write_bytes(pack(metadata, ONE))
    header = len(path.read_bytes()) - 64
    outcome = run_case(server, CLASS, f"{FUZZ}gguf", [str(path), 3, 450, header], tmp_path)
    assert outcome.kind == "result", outcome
    assert outcome.value["refused"] > 250
    assert [wrong for wrong in outcome.value["read"] if wrong] == []


def test_chance_damage_never_changes_a_models_weights_in_silence(server, tmp_path, parts):
    path = tmp_path / "x.gguf"
    path.write_bytes(pack(*parts))
    outcome = run_case(server, CLASS, f"{FUZZ}gguf_models", [str(path), 4, 45, 1200], tmp_path)
    assert outcome.kind == "result", outcome
    assert outcome.value["refused"] > 20
    assert all(outcome.value["read"])
