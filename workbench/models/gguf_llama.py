"""A Llama in a GGUF file: its names, layout and configuration, turned into Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from workbench.errors import ConfigError, FileFormatError
from workbench.models.gguf_format import GGUFFile
from workbench.models.rope import rope_periods

TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
NUMBERS = {  # Hugging Face's name: GGUF's
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
MAX_WORD = 100  # characters of a metadata string that is a name
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class GGUFCheckpoint:
    """A Llama's tensors and configuration under Hugging Face's names."""

    weights: dict[str, mx.array]
    config: dict[str, object]
    metadata: dict[str, object]
    file_dtypes: dict[str, str]

    @property
    def kinds(self) -> list[str]:
        """The tensor types in the file, such as Q4_1."""
        return sorted(set(self.file_dtypes.values()))


def read(path: str | Path, dtype: mx.Dtype) -> GGUFCheckpoint:
    """Read a Llama-family GGUF file and dequantise it to `dtype`.

    Raises:
        FileFormatError: the file is malformed, or two of its tensors have one name here.
        ConfigError: another architecture, or its configuration lacks a number.
    """
    file = GGUFFile(path)
    architecture = _scalar(file, "general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"architecture {architecture!r} cannot be read from GGUF",
            where=path,
            cure="Use the model's safetensors folder; from GGUF, the Llama family is read.",
        )
    config = _config(file)
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    weights, file_dtypes = {}, {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS:
            continue
        array, ours = file.read(name), hugging_face_name(name)
        if ".attn_q." in name:
            array = half_split_rows(array, heads, path)
        elif ".attn_k." in name:
            array = half_split_rows(array, kv_heads or heads, path)
        if ours in weights:
            raise FileFormatError(f"holds {ours} twice, once as {name}", where=path)
        weights[ours] = mx.array(array).astype(dtype)
        file_dtypes[ours] = tensor.kind.name
    return GGUFCheckpoint(weights, config, file.metadata, file_dtypes)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    in_layer = LAYER_NAME.fullmatch(name)
    if in_layer and in_layer[2] in IN_LAYER:
        return f"model.layers.{in_layer[1]}.{IN_LAYER[in_layer[2]]}.{in_layer[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{TOP_LEVEL[stem]}.{kind}" if stem in TOP_LEVEL else name


def half_split_rows(weight: np.ndarray, heads: int, source: object = "GGUF") -> np.ndarray:
    """Undo GGUF's row order of q and k: pairs (0, 1), (2, 3), … become (0, d/2), (1, d/2 + 1), …

    GGUF stores the rows for interleaved RoPE, Hugging Face's layout rotates half against half.

    Args:
        weight: (heads · head_dim, in) or (heads · head_dim,).
        heads: number of heads that the rows belong to.
        source: the file, for messages.
    """
    if not isinstance(heads, int) or heads < 1 or weight.shape[0] % (2 * heads):
        raise ConfigError(f"{weight.shape[0]} rows do not make {heads!r} heads", where=source)
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _config(file: GGUFFile) -> dict[str, object]:
    metadata = file.metadata
    config: dict[str, object] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for ours, theirs in NUMBERS.items():
        if f"llama.{theirs}" in metadata:
            config[ours] = _scalar(file, f"llama.{theirs}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    for name in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{name}" in metadata:
            config[name] = _scalar(file, f"tokenizer.ggml.{name}")
    rotated = _scalar(file, "llama.rope.dimension_count")
    if rotated is not None and config.setdefault("head_dim", rotated) != rotated:
        raise ConfigError(f"rotates only {rotated} features of each head", where=file.path)
    scaling = _rope_scaling(file, config)
    return {**config, "rope_scaling": scaling} if scaling else config


def _scalar(file: GGUFFile, key: str) -> object:
    """A number or a short string of the metadata; None where it is absent."""
    value = file.metadata.get(key)
    if isinstance(value, list) or (isinstance(value, str) and len(value) > MAX_WORD):
        raise ConfigError(f"{key} must be one number or word", where=file.path)
    return value


def _rope_scaling(file: GGUFFile, config: Mapping[str, object]) -> dict[str, object] | None:
    kind = _scalar(file, "llama.rope.scaling.type")
    if kind not in (None, "none"):
        return {"rope_type": kind, "factor": _scalar(file, "llama.rope.scaling.factor")}
    if ROPE_FACTORS not in file.tensors:
        return None
    # llama.cpp stores the stretch of each wavelength; recover the rule that it came from.
    factors = file.read(ROPE_FACTORS)
    dims, base = 2 * factors.size, config.get("rope_theta", 10_000.0)
    if factors.ndim != 1 or not isinstance(base, float):
        raise ConfigError("has a malformed RoPE", where=file.path)
    scaling = {**LLAMA3, "factor": float(factors.max())}
    plain, stretched = rope_periods(dims, base, None)[0], rope_periods(dims, base, scaling)[0]
    if not np.allclose(np.array(stretched / plain), factors, rtol=1e-3):
        raise ConfigError("has RoPE factors that are not Llama 3's", where=file.path)
    return scaling
