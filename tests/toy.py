"""Toy models and tokenizers: the real classes, small enough for breadth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workbench.data.datasets import Dataset
from workbench.data.examples import Example
from workbench.models.llama import Llama
from workbench.models.llama_config import LlamaConfig
from workbench.models.loading import BaseModel, save_weights
from workbench.models.report import compare

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = len(SPECIAL) + 256
TOY_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def toy_model(seed: int = 0, **changes: object) -> Llama:
    """A two-layer Llama with random weights, large enough that its logits differ clearly."""
    model = Llama(LlamaConfig.from_dict({**TOY_CONFIG, **changes}))
    key, randomised = mx.random.key(seed), []
    for name, parameter in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        noise = mx.random.normal(parameter.shape, key=own)
        randomised.append((name, 1 + 0.1 * noise if "norm" in name else 0.2 * noise))
    model.update(tree_unflatten(randomised))
    mx.eval(model.parameters())
    return model


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template in ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def toy_base(seed: int = 0, **changes: object) -> BaseModel:
    """A toy network with its tokenizer, as `load_model` would return it."""
    model = toy_model(seed, **changes)
    parameters = dict(tree_flatten(model.parameters()))
    report = compare(parameters, parameters, source="toy")
    raw_config = {**TOY_CONFIG, **changes}
    return BaseModel(model, toy_tokenizer(), model.config, report, "toy", Path("toy"), raw_config)


def save_toy_folder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A model folder as Hugging Face lays it out: config, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    base = toy_base(seed, **changes)
    (folder / "config.json").write_text(json.dumps(base.raw_config))
    save_weights(base.model, folder / "model.safetensors")
    base.tokenizer.save_pretrained(folder)
    return folder


def conversation(*texts: str) -> dict[str, list]:
    """A chat row: user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """A row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toy_examples(lengths: Sequence[int], seed: int = 0, prompt: int = 2) -> list[Example]:
    """Random tokens; all but the first `prompt` of them are targets."""
    random = np.random.default_rng(seed)
    examples = []
    for row, length in enumerate(lengths):
        tokens = random.integers(len(SPECIAL), VOCAB_SIZE, length, dtype=np.int32)
        examples.append(Example(tokens, np.arange(length) >= prompt, f"toy row {row}"))
    return examples


def toy_dataset(lengths: Sequence[int], valid: Sequence[int] = (), seed: int = 0) -> Dataset:
    """A data set of `toy_examples` of these lengths."""
    return Dataset("toy", toy_examples(lengths, seed), toy_examples(valid, seed + 1))
