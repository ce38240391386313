"""From files to a network with weights, and a report of every tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from transformers import PreTrainedTokenizerBase

from workbench.backend import default_dtype, on_gpu
from workbench.errors import ConfigError, WeightsError, check_kind
from workbench.machine import machine_memory
from workbench.models import gguf_llama
from workbench.models.decoder import Decoder
from workbench.models.files import read_safetensors, read_weights, write_safetensors
from workbench.models.filling import cast, fill
from workbench.models.foreign import build_with_mlx_lm
from workbench.models.llama import Llama
from workbench.models.llama_config import LlamaConfig
from workbench.models.model_config import check_end_tokens, read_config
from workbench.models.nanochat import NanoChat
from workbench.models.nanochat_config import NanoChatConfig
from workbench.models.quantisation import dequantise, quantise_like_file
from workbench.models.quantisation import quantise as quantise_network
from workbench.models.report import LoadReport, compare
from workbench.models.sealing import require_sealed, sealed
from workbench.models.sources import find_model
from workbench.models.tokenizers import check_tokenizer, gguf_tokenizer, load_tokenizer
from workbench.numerics import not_finite

Quantise = Mapping[str, object] | bool | None

OURS = {  # model_type of a checkpoint → what it becomes, and of which dimensions
    "llama": (Llama, LlamaConfig),
    "mistral": (Llama, LlamaConfig),
    "nanochat": (NanoChat, NanoChatConfig),
}


@dataclass(repr=False)
class BaseModel:
    """A network with its weights, tokenizer and configuration."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: object  # dimensions under Hugging Face's names: config.hidden_size, …
    report: LoadReport
    name: str  # as it was asked for
    path: Path  # the folder or file it came from
    raw_config: dict[str, object]  # config.json
    quantise: Quantise = None  # as it was asked for
    seed: int | None = None  # of the first weights, if they were random numbers

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a generated answer: the config's and the tokenizer's."""
        ids = self.raw_config.get("eos_token_id")
        listed = ids if isinstance(ids, list) else [ids]
        known = (*listed, self.tokenizer.eos_token_id)
        return frozenset(number for number in known if isinstance(number, int))

    def __str__(self) -> str:
        return f"{self.name}: {self.raw_config.get('model_type')}; {self.report}"

    __repr__ = __str__


def require_base(base: object) -> None:
    """Raise ConfigError unless this is a BaseModel, such as for its network alone."""
    check_kind("base", base, BaseModel, "Give what wb.load_model returns, not its .model.")


def load_model(
    source: str | os.PathLike,
    *,
    dtype: mx.Dtype | None = None,
    tokenizer: str | os.PathLike | None = None,
    strict: bool = True,
    quantise: Quantise = None,
) -> BaseModel:
    """Load a causal language model.

    Checkpoints of the Llama family and nanochat's become networks of ours; mlx-lm builds others.

    Args:
        source: built-in name (`smollm2-135m`), folder, .gguf file, or Hugging Face hub id.
        dtype: of the floating-point weights; default float32 on a CPU, the file's own elsewhere.
        tokenizer: a folder with another tokenizer than the model's own.
        strict: raise unless every parameter is filled, with finite numbers, and nothing is left
            over.
        quantise: {"bits": 4, "group_size": 64} quantises what is loaded; True keeps what the file
            has quantised. None does so on a GPU; on a CPU, where products of float32 are tens of
            times faster, those of a network of ours become plain numbers.

    Raises:
        SourceError, FileFormatError, ConfigError, WeightsError, TokenizerError: each names the
            place and the cure; nothing is kept of a model that does not load.
    """
    path, dtype = find_model(source), check_floating(dtype) or default_dtype()
    load = _load_gguf if path.is_file() else _load_folder
    base = load(path, dtype, tokenizer, quantise)
    base.name, base.quantise = os.fspath(source), quantise
    if strict:
        base.report.require_complete()
    if quantise is not None:
        base.report.notes.append(_quantised(base.model, quantise))
    _require_room(base.model, path)
    _evaluate(base.model)
    if strict:
        _require_finite(base.model.parameters(), path)
    base.model.eval()
    return base


def _evaluate(model: nn.Module) -> None:
    """Compute the parameters one by one: what one is quantised from need not stay for the next."""
    for _, parameter in tree_flatten(model.parameters()):
        mx.eval(parameter)


def check_floating(dtype: object) -> mx.Dtype | None:
    """A dtype; raises ConfigError unless it is None or one of MLX's floating-point types."""
    known = isinstance(dtype, mx.Dtype) and mx.issubdtype(dtype, mx.floating)
    if dtype is not None and not known:
        cure = "Such as mx.float16 or mx.bfloat16."
        raise ConfigError(f"dtype must be a floating-point type, got {dtype!r}", cure=cure)
    return dtype


def _require_finite(parameters: object, where: object) -> None:
    bad = not_finite(parameters)
    if bad:
        raise WeightsError(
            f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:5])}",
            where=where,
            cure="Fetch them again; strict=False loads them all the same.",
        )


def _quantised(model: nn.Module, settings: Quantise) -> str:
    """Quantise a network, or make sure that it is; says so."""
    if settings is not True:
        return quantise_network(model, settings)
    kept = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear)]
    if not kept:
        raise ConfigError(
            "quantise=True keeps what the file has, and it has nothing quantised",
            cure='Quantise on load: quantise={"bits": 4, "group_size": 64}.',
        )
    return f"{len(kept)} layers stay quantised"


def _require_room(model: nn.Module, where: object) -> None:
    """Refuse parameters beyond the machine's memory: MLX would end the process."""
    needed = sum(parameter.nbytes for _, parameter in tree_flatten(model.parameters()))
    memory = machine_memory()
    if memory is not None and needed > memory.total_bytes:
        raise ConfigError(
            f"describes {needed:,} bytes of parameters; this machine has {memory.total_bytes:,}",
            where=where,
            cure="Load a smaller or quantised model.",
        )


def _load_gguf(
    path: Path, dtype: mx.Dtype | None, tokenizer: object, quantise: Quantise
) -> BaseModel:
    if quantise is True:
        raise ConfigError(
            "quantise=True keeps a folder's layers; those of a .gguf file become numbers",
            cure='Quantise on load: quantise={"bits": 4, "group_size": 32}.',
        )
    checkpoint = gguf_llama.read(path, dtype or mx.float16)
    config = _dimensions(LlamaConfig, checkpoint.config, path)
    check_end_tokens(checkpoint.config, path)
    words = load_tokenizer(tokenizer) if tokenizer else gguf_tokenizer(checkpoint.metadata, path)
    check_tokenizer(words, config.vocab_size, path)
    model = Llama(config)
    report = fill(
        model,
        checkpoint.weights,
        source=str(path),
        file_dtypes=checkpoint.file_dtypes,
        notes=[f"converted from {', '.join(checkpoint.kinds)}"],
    )
    return BaseModel(model, words, config, report, "", path, checkpoint.config)


def _dimensions(
    kind: type[LlamaConfig | NanoChatConfig], raw_config: Mapping[str, object], file: Path
) -> LlamaConfig | NanoChatConfig:
    try:
        return kind.from_dict(raw_config)
    except ConfigError as error:
        where = error.where.replace("config.json", str(file), 1)
        raise ConfigError(error.what, where=where, cure=error.cure) from None


def _load_folder(
    path: Path, dtype: mx.Dtype | None, tokenizer: object, quantise: Quantise
) -> BaseModel:
    raw_config = read_config(path)
    if _is_ours(raw_config):
        model, config, report = _build(path, raw_config, dtype, quantise is True or on_gpu())
    else:
        model, config, report = build_with_mlx_lm(path, raw_config, dtype)
    if report.complete and not isinstance(quantise, Mapping):  # then they need not all be there
        _require_room(model, path)
        mx.async_eval(model.parameters())  # MLX reads them while the tokenizer is made
    words = load_tokenizer(tokenizer or path)  # after it: transformers, too, reads config.json
    check_tokenizer(words, embedding_rows(model, config), path)
    return BaseModel(model, words, config, report, "", path, raw_config)


def _is_ours(config: Mapping[str, object]) -> bool:
    foreign_quantisation = "quantization_config" in config and "quantization" not in config
    other = any(config.get(name) for name in ("sliding_window", "rope_traditional"))
    return config["model_type"] in OURS and not other and not foreign_quantisation


def _build(
    path: Path, raw_config: dict[str, object], dtype: mx.Dtype | None, keep_quantised: bool
) -> tuple[Decoder, LlamaConfig | NanoChatConfig, LoadReport]:
    network, kind = OURS[raw_config["model_type"]]
    config = _dimensions(kind, raw_config, path / "config.json")
    weights = read_weights(path)
    file_dtypes = {name: str(w.dtype).removeprefix("mlx.core.") for name, w in weights.items()}
    model, notes = network(config), []
    quantization = raw_config.get("quantization")
    if isinstance(quantization, dict) and keep_quantised:
        quantise_like_file(model, quantization, weights)
    elif isinstance(quantization, dict):
        weights = dequantise(weights, quantization)
        notes.append("dequantised: on a CPU, float32 products are the fast ones")
    weights = {name: cast(tensor, dtype) for name, tensor in weights.items()}
    report = fill(model, weights, source=str(path), file_dtypes=file_dtypes, notes=notes)
    return model, config, report


def embedding_rows(model: nn.Module, config: object) -> int:
    """Number of token ids that the network has an embedding for."""
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    found = [m.weight.shape[0] for m in model.modules() if isinstance(m, embeddings)]
    declared = getattr(config, "vocab_size", None)
    # A network may also embed positions, or each layer's own tokens.
    return declared if declared in found or not found else max(found)


def save_weights(
    model: nn.Module, path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write every parameter of a network, by name, to one safetensors file with their SHA-256.

    Args:
        model: the network.
        path: the file; replaced whole or not at all.
        metadata: texts by name that the file shall carry, too; `read_metadata` gives them back.

    Raises:
        ConfigError: no network, or metadata that are not texts by name or take the names format
            or sha256.
        FileFormatError: the file cannot be written.
    """
    check_kind("model", model, nn.Module, "Give a network, such as base.model.")
    parameters = dict(tree_flatten(model.parameters()))
    write_safetensors(path, parameters, sealed(parameters, metadata))


def load_weights(model: nn.Module, path: str | os.PathLike, *, strict: bool = True) -> LoadReport:
    """Fill a network from one safetensors file that `save_weights` wrote.

    Raises:
        ConfigError: model is no network.
        FileFormatError: the file is malformed, or a byte is not what `save_weights` wrote.
        WeightsError: strict, and a tensor is missing, unexpected, misshapen, of another dtype or
            not finite; the network is then left as it was.
    """
    check_kind("model", model, nn.Module, "Give a network, such as base.model.")
    weights = read_safetensors(path)
    require_sealed(path, weights)
    expected = dict(tree_flatten(model.parameters()))
    report = compare(expected, weights, source=str(path), same_dtype=True)
    if strict:
        report.require_complete()
        _require_finite(weights, path)
    model.load_weights([(name, weights[name]) for name in report.loaded], strict=False)
    mx.eval(model.parameters())
    return report
