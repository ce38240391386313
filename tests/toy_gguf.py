"""GGUF files as llama.cpp's converter would write them, made with the gguf package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.toy import CHAT_TEMPLATE, SPECIAL
from workbench.models.gguf_llama import IN_LAYER, NUMBERS, TOP_LEVEL
from workbench.models.llama import Llama

KINDS = {kind.name: kind for kind in GGMLQuantizationType}


TRAINED_VOCAB_SIZE = 320


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with some fifty merges and individual digits, as SmolLM2 has it."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    text = "The capital of the country is the capital that the country has named its capital. "
    text += "São Paulo and Curaçao are not capitals; 1234 5678"
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def interleaved_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, …: GGUF's, for interleaved RoPE."""
    head_dim = len(weight) // heads
    order = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    stem, _, kind = name.rpartition(".")
    for theirs, ours in TOP_LEVEL.items():
        if stem == ours:
            return f"{theirs}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    (theirs,) = [theirs for theirs, ours in IN_LAYER.items() if ours == part]
    return f"blk.{layer}.{theirs}.{kind}"


def write_toy_gguf(
    path: Path,
    model: Llama,
    tokenizer: PreTrainedTokenizerFast,
    kind: str = "F32",
    metadata: dict[str, object] | None = None,
    factors: np.ndarray | None = None,
) -> Path:
    """Write a Llama and its byte-level tokenizer; matrices in `kind`, vectors in F32.

    `metadata` replaces or adds numbers and strings; None leaves one out.
    """
    writer = GGUFWriter(path, "llama")
    numbers = {f"llama.{theirs}": getattr(model.config, ours) for ours, theirs in NUMBERS.items()}
    for key, value in {**numbers, **(metadata or {})}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](key, value)
    _add_tokenizer(writer, tokenizer)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, parameter in tree_flatten(model.parameters()):
        weight = np.array(parameter)
        projection = name.split(".")[-2]
        if projection in heads:
            weight = interleaved_rows(weight, heads[projection])
        own_kind = KINDS[kind] if weight.ndim == 2 else KINDS["F32"]
        writer.add_tensor(gguf_name(name), quantize(weight, own_kind), raw_dtype=own_kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    return _written(writer, path)


def write_tensors(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> Path:
    """Write bare tensors, name → (float32 values, kind), aligned to 64, and some metadata."""
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint32("key_one", 42)
    writer.add_float32("key_two", 0.5)
    writer.add_array("words", ["alpha", "beta"])
    writer.add_array("numbers", [1, 2, 3])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, quantize(values, KINDS[kind]), raw_dtype=KINDS[kind])
    return _written(writer, path)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(
        [TokenType.CONTROL if number in special else TokenType.NORMAL for _, number in vocab]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _written(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
