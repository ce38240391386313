"""GGUF: a Llama and its tokenizer in one file, as llama.cpp's own converter would write it.

Names, row order and metadata follow the GGUF specification (ggml, docs/gguf.md) and llama.cpp's
convert_hf_to_gguf.py; the gguf package writes the file and rounds to its block formats.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from workbench.errors import ConfigError, FileFormatError, WeightsError
from workbench.export.gguf_tokenizer import Vocabulary, read_vocabulary
from workbench.export.model_card import CARD_NAME, card, escaped_name, read_run, write_card
from workbench.export.weights import fused_weights
from workbench.models.files import replacing
from workbench.models.gguf_llama import IN_LAYER, NUMBERS, ROPE_FACTORS, TOP_LEVEL
from workbench.models.llama import Llama
from workbench.models.llama_config import LlamaConfig
from workbench.models.loading import BaseModel, require_base
from workbench.models.rope import rope_kind, rope_periods

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
KINDS = {
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
OURS = {ours: theirs for theirs, ours in {**TOP_LEVEL, **IN_LAYER}.items()}
QUANTISATION_VERSION = 2  # of ggml's block formats


@dataclass(frozen=True)
class GGUFExport:
    """What `export_gguf` wrote."""

    path: Path
    kind: str
    num_tensors: int
    num_bytes: int  # of the file
    card: Path | None  # README.md beside it; None where somebody else's stays

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_bytes / 1e6:.1f} MB"
        return f"{self.path}: {size}, {self.kind}; for llama.cpp"


def export_gguf(
    base: BaseModel,
    path: str | os.PathLike,
    kind: str = "f16",
    force: bool = False,
    *,
    run_dir: str | os.PathLike | None = None,
) -> GGUFExport:
    """Write a Llama, with its adapter in the weights, as one GGUF file for llama.cpp.

    Matrices are stored in `kind`, norms and biases in float32. A model card goes beside it, unless
    there is a README.md that somebody else wrote.

    Args:
        base: a network of the Llama family with a byte-level BPE tokenizer of a kind that
            llama.cpp has a name for; with or without an adapter. It is not changed.
        path: of the file, ending in .gguf; replaced whole or not at all.
        kind: "f16", or "q8_0" for blocks of 32 numbers in 8 bits and a 16-bit scale.
        force: replace a file that is there.
        run_dir: the run that trained it, for the model card.

    Raises:
        ConfigError: another architecture, an unknown kind, or a file that is there.
        TokenizerError: llama.cpp has no name for how the tokenizer cuts text.
        WeightsError: a number is not finite in the stored type.
        RunError: run_dir holds no run.
        FileFormatError: the file cannot be written.
    """
    require_base(base)
    path, run = _checked(base, path, kind, force), read_run(run_dir)
    vocabulary = read_vocabulary(base.tokenizer, base.config.vocab_size, base.name)
    with replacing(path) as temporary:
        num_tensors = _write(temporary, base, vocabulary, kind)
    facts = {"file": path.name, "stored as": kind, "tensors": num_tensors, "loads in": "llama.cpp"}
    title, use = f"A GGUF file of {escaped_name(base)}", f"llama-cli -m {path.name}"
    text = card(base, title, facts, use, "gguf", ["gguf", kind], run)
    written = write_card(path.parent, text)
    readme = path.parent / CARD_NAME if written else None
    return GGUFExport(path, kind, num_tensors, path.stat().st_size, readme)


def _checked(base: BaseModel, path: str | os.PathLike, kind: str, force: bool) -> Path:
    path = Path(os.path.realpath(os.path.expanduser(path)))
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}", cure=f"Use one of {tuple(KINDS)}.")
    if not isinstance(base.model, Llama):
        raise ConfigError(
            f"a {type(base.model).__name__} of {type(base.model).__module__} cannot be written",
            where=path,
            cure="GGUF export knows the Llama family; wb.fuse writes any architecture.",
        )
    if path.suffix != ".gguf":
        raise ConfigError("must end in .gguf", where=path)
    if path == Path(os.path.realpath(base.path)):
        raise ConfigError("is the base model's own file", where=path, cure="Choose another name.")
    if os.path.lexists(path) and not (force and path.is_file()):
        raise ConfigError("is there already", where=path, cure="force=True replaces a file.")
    return path


def _write(path: Path, base: BaseModel, vocabulary: Vocabulary, kind: str) -> int:
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_name(Path(base.name).name)
        writer.add_file_type(KINDS[kind][1])
        writer.add_quantization_version(QUANTISATION_VERSION)
        _add_config(writer, base.config)
        vocabulary.add_to(writer)
        weights = fused_weights(base.model)
        for name in sorted(weights):
            writer.add_tensor(*_tensor(name, weights[name], base.config, KINDS[kind][0]))
        if (factors := _rope_factors(base.config)) is not None:
            writer.add_tensor(ROPE_FACTORS, factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise FileFormatError(f"the gguf package refuses it ({error})", where=path) from None
    finally:
        writer.close()
    return len(weights)


def _add_config(writer: GGUFWriter, config: LlamaConfig) -> None:
    for ours, theirs in NUMBERS.items():
        value = getattr(config, ours)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{theirs}", value)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if rope_kind(config.rope_scaling) == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(config.rope_scaling["factor"]))


def _rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """The stretch of each of RoPE's wavelengths (head_dim / 2,), which Llama 3.1 and later have."""
    if rope_kind(config.rope_scaling) != "llama3":
        return None
    stretched, _ = rope_periods(config.head_dim, config.rope_theta, config.rope_scaling)
    plain, _ = rope_periods(config.head_dim, config.rope_theta, None)
    return np.array(stretched / plain)


def _tensor(
    name: str, array: mx.array, config: LlamaConfig, kind: GGMLQuantizationType
) -> tuple[str, np.ndarray, None, GGMLQuantizationType]:
    """GGUF's name, bytes, shape (as the bytes have it) and type of a tensor."""
    stem, _, leaf = name.rpartition(".")
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    numbers = np.array(array.astype(mx.float32))
    if part == "self_attn.q_proj":
        numbers = _interleaved_rows(numbers, config.num_attention_heads)
    elif part == "self_attn.k_proj":
        numbers = _interleaved_rows(numbers, config.num_key_value_heads)
    theirs = f"{OURS[stem]}.{leaf}" if stem in OURS else f"blk.{layer}.{OURS[part]}.{leaf}"
    stored = _stored_kind(numbers, kind)
    with np.errstate(over="ignore"):
        rounded = quantize(numbers, stored)
    largest = np.abs(numbers).max() / (127 if stored not in (F16, F32) else 1)
    if not np.isfinite(largest) or (stored is not F32 and largest > np.finfo(np.float16).max):
        raise WeightsError(f"{name} holds NaN, infinity, or a number too large for {stored.name}")
    return theirs, rounded, None, stored


def _stored_kind(numbers: np.ndarray, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if numbers.ndim == 1:
        return F32
    return kind if numbers.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else F16


def _interleaved_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, …: GGUF rotates neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
