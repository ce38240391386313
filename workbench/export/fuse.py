"""Fuse: a whole model folder for mlx-lm and transformers, with the adapter in the weights."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from workbench.errors import ConfigError, FileFormatError, check_whole
from workbench.export import drift
from workbench.export.folders import check_place, replace_folder
from workbench.export.model_card import CARD_NAME, Run, card, escaped_name, read_run
from workbench.export.model_config import GENERATION_NAME, export_config, generation_config
from workbench.export.weights import (
    fused_weights,
    quantised_weights,
    require_read_back,
    write_shards,
)
from workbench.models.files import read_json, write_json
from workbench.models.llama import Llama
from workbench.models.loading import BaseModel, check_floating, require_base
from workbench.models.quantisation import quantisation_settings
from workbench.models.tokenizers import is_failure

MAX_SHARD_BYTES = 5_000_000_000  # as transformers and mlx-lm cut
QUANTISATION = ("bits", "group_size")
TOKENIZER_CONFIG = "tokenizer_config.json"
# transformers 5 reads either name, transformers 4 the old one only.
NEW_CLASS, OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class FusedModel:
    """What `fuse` wrote."""

    path: Path
    num_tensors: int
    num_bytes: int  # of all tensors
    quantisation: Mapping[str, object] | None  # bits and group_size
    tools: tuple[str, ...]  # that load it, beside this workbench
    drift: drift.Drift | None = None  # measured where it was quantised

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_bytes / 1e6:.1f} MB"
        kind = "plain" if self.quantisation is None else f"{self.quantisation['bits']} bits"
        lines = [f"{self.path}: {size}, {kind}; for {' and '.join(self.tools)}"]
        return "; ".join([*lines, *([str(self.drift)] if self.drift else [])])


def fuse(
    base: BaseModel,
    folder: str | os.PathLike,
    dtype: mx.Dtype | None = None,
    quantise: Mapping[str, int] | None = None,
    force: bool = False,
    *,
    run_dir: str | os.PathLike | None = None,
    prompts: Sequence[str] = drift.PROMPTS,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> FusedModel:
    """Write a model folder: config, weights, tokenizer with chat template, generation config, card.

    mlx-lm loads it; transformers too, if the network is our Llama and nothing is quantised. It is
    written beside its place and moved there whole; an earlier export is replaced whole.

    Args:
        base: a model, with or without an adapter; it is not changed.
        folder: not there yet, empty, or an earlier export as it was written.
        dtype: of floating-point weights; default as the network holds them. What is quantised in
            memory is written dequantised, unless `quantise` is given.
        quantise: {"bits": 4, "group_size": 64}. The export is loaded, and rounding must not take
            back or drown what the adapter does to the logits of `prompts` (`drift`).
        force: write where rounding does, and where `folder` is something else, which is moved
            aside to a name beside it.
        run_dir: the run that trained it, for the model card.
        prompts: questions that a quantised export is compared on.
        max_shard_bytes: of one file of weights.

    Raises:
        ConfigError: the folder is taken, or is the base model's own; a setting is impossible.
        WeightsError: quantisation swallows the adapter, a weight is not finite, or mlx-lm would
            change one as it reads it.
        RunError: run_dir holds no run.
        FileFormatError: the folder cannot be written; what was there is intact.
    """
    require_base(base)
    settings = _checked(dtype, quantise)
    wish = _Wish(dtype, settings, force, read_run(run_dir), prompts, max_shard_bytes)
    return _put(base, check_place(base, folder, force), wish)


@dataclass(frozen=True)
class _Wish:
    """How to write, checked; the fields are arguments of `fuse`."""

    dtype: mx.Dtype | None
    settings: Mapping[str, int] | None
    force: bool
    run: Run | None
    prompts: Sequence[str]
    max_shard_bytes: int

    def __post_init__(self):
        check_whole("max_shard_bytes", self.max_shard_bytes, 1)
        asked = self.prompts if isinstance(self.prompts, list | tuple) else ()
        if not asked or not all(isinstance(prompt, str | Sequence) for prompt in asked):
            got = reprlib.repr(self.prompts)
            raise ConfigError(f"prompts must be a list of questions, got {got}")


def _put(base: BaseModel, place: Path, wish: _Wish) -> FusedModel:
    made: list[FusedModel] = []

    def write(staging: Path) -> None:
        fused = _write(base, staging, wish)
        measured = drift.measure(base, staging, wish.prompts) if wish.settings else None
        if measured and not wish.force:
            drift.require_adapter(measured, place)
        made.append(dataclasses.replace(fused, path=place, drift=measured))
        (staging / CARD_NAME).write_text(_card(base, made[0], wish.run), encoding="utf-8")

    replace_folder(place, write, wish.force)
    return made[0]


def _checked(dtype: mx.Dtype | None, quantise: Mapping[str, int] | None) -> dict[str, int] | None:
    check_floating(dtype)
    if quantise is None:
        return None
    if not isinstance(quantise, Mapping) or quantise.keys() != set(QUANTISATION):
        raise ConfigError(f"quantise must have {' and '.join(QUANTISATION)}, got {quantise!r}")
    quantisation_settings(quantise, "")
    return {name: quantise[name] for name in QUANTISATION}


def _write(base: BaseModel, folder: Path, wish: _Wish) -> FusedModel:
    weights, quantization = fused_weights(base.model, wish.dtype), None
    if wish.settings is not None:
        weights, quantization = quantised_weights(base.model, weights, wish.settings)
    require_read_back(base.model, weights)
    write_json(folder / "config.json", export_config(base, weights, quantization))
    generation = generation_config(base)
    if generation:
        write_json(folder / GENERATION_NAME, generation)
    _save_tokenizer(base, folder)
    num_tensors, num_bytes = len(weights), sum(array.nbytes for array in weights.values())
    write_shards(folder, weights, wish.max_shard_bytes)
    both = isinstance(base.model, Llama) and wish.settings is None
    tools = ("mlx-lm", "transformers") if both else ("mlx-lm",)
    return FusedModel(folder, num_tensors, num_bytes, wish.settings, tools)


def _save_tokenizer(base: BaseModel, folder: Path) -> None:
    # Several chat templates would make a folder in the folder; tokenizer_config.json holds them.
    one_template = not isinstance(base.tokenizer.chat_template, dict)
    try:
        base.tokenizer.save_pretrained(folder, save_jinja_files=one_template)
    except BaseException as error:
        if not is_failure(error):
            raise
        reason = str(error).strip().split("\n")[0][:300]
        raise FileFormatError(f"the tokenizer cannot be written ({reason})", where=folder) from None
    settings = read_json(folder / TOKENIZER_CONFIG)
    if settings.get("tokenizer_class") == NEW_CLASS:
        settings.pop("backend", None)
        write_json(folder / TOKENIZER_CONFIG, {**settings, "tokenizer_class": OLD_CLASS})


def _card(base: BaseModel, fused: FusedModel, run: Run | None) -> str:
    facts = {
        "tensors": fused.num_tensors,
        "size": f"{fused.num_bytes / 1e6:.1f} MB",
        "quantisation": fused.quantisation or "none",
        "loads in": ", ".join(fused.tools),
    }
    tags = ["mlx"] if fused.quantisation is None else ["mlx", f"{fused.quantisation['bits']}-bit"]
    measured = [f"Against the model it was made of, {fused.drift}."] if fused.drift else []
    library = "transformers" if "transformers" in fused.tools else "mlx"
    title = f"A model made of {escaped_name(base)}"
    use = "mlx_lm.generate --model <this folder>"
    return card(base, title, facts, use, library, tags, run, measured)
