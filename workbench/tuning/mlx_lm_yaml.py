"""A run in the words of `mlx_lm.lora`'s YAML: read into ours, with what differs said."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workbench.errors import ConfigError, check_number, check_whole
from workbench.models.yaml_files import read_yaml
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import ALL_LINEAR, LARGEST_RANK, LoRAConfig
from workbench.tuning.mlx_lm_settings import (
    DEFAULTS,
    ELSEWHERE,
    FIELDS,
    FIXED,
    LARGEST_COUNT,
    OPTIONS,
    check_keys,
    complete,
)

Settings = Mapping[str, object]
EXACT = 1e-15  # relative error of a quotient and a product of floats


@dataclass(frozen=True)
class MlxLmRun:
    """What a YAML of `mlx_lm.lora` says, in our words."""

    train: TrainConfig
    lora: LoRAConfig | None = field(default_factory=LoRAConfig)  # None: everything trains
    model: str = DEFAULTS["model"]  # a folder or a hub's name
    data: str = DEFAULTS["data"]  # a folder or a hub's name
    adapter_path: str = DEFAULTS["adapter_path"]  # folder that gets what was trained
    max_length: int = DEFAULTS["max_seq_length"]  # tokens of a row, for load_dataset
    train_on: str = "all"  # for load_dataset; "last" where the prompt is masked
    notes: tuple[str, ...] = field(default=(), compare=False)  # what differs, and what was set

    def __post_init__(self):
        check_whole("max_length", self.max_length, 2)
        if self.train_on not in ("all", "last"):
            raise ConfigError(
                f"train_on must be 'all' or 'last' (mask_prompt) here, got {self.train_on!r}"
            )


def read_mlx_lm_yaml(path: str | os.PathLike) -> MlxLmRun:
    """Read a YAML that `python -m mlx_lm lora --config` takes.

    What mlx-lm counts in its iterations (micro-batches) becomes optimizer updates; its `scale`
    becomes alpha = scale · rank; what the file leaves out is mlx-lm's default. Learning rates are
    mlx-lm's at every update. What cannot be the same stands in `notes`.

    Raises:
        FileFormatError: not a plain YAML file of a bounded size.
        ConfigError: an unknown key, a wrong type, a value out of range, or a setting that has no
            equal here.
    """
    said = read_yaml(path)
    try:
        return _convert(said)
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where or Path(path), cure=error.cure) from None


def _convert(said: Settings) -> MlxLmRun:
    settings, notes = complete(said), _defaults_used(said)
    accum, iters = settings["grad_accumulation_steps"], settings["iters"]
    if iters < accum:
        raise ConfigError(
            f"iters {iters} is less than grad_accumulation_steps {accum}: no update would be made"
        )
    train = TrainConfig(
        steps=iters // accum,
        micro_batch_size=settings["batch_size"],
        grad_accum_steps=accum,
        max_grad_norm=0.0,
        valid_every=_in_steps("steps_per_eval", settings, notes),
        checkpoint_every=_in_steps("save_every", settings, notes),
        grad_checkpoint=settings["grad_checkpoint"],
        seed=settings["seed"],
        **_rates(said, settings, iters // accum, notes),
        **_optimizer(settings, notes),
    )
    _note_loop(said, settings, notes)
    return MlxLmRun(
        train,
        _lora(settings, notes),
        settings["model"],
        settings["data"],
        settings["adapter_path"],
        settings["max_seq_length"],
        "last" if settings["mask_prompt"] else "all",
        tuple(notes),
    )


def _defaults_used(said: Settings) -> list[str]:
    telling = ("model", "data", "iters", "batch_size", "num_layers", "optimizer", "lora_parameters")
    left = [f"{name} {DEFAULTS[name]}" for name in telling if said.get(name) is None]
    if said.get("learning_rate") is None and said.get("lr_schedule") is None:
        left.append(f"learning_rate {DEFAULTS['learning_rate']:g}")
    return [f"not in the file, so mlx-lm's own: {', '.join(left)}"] if left else []


def _in_steps(name: str, settings: Settings, notes: list[str]) -> int:
    """A period of iterations in optimizer updates; 0 where it is the whole run or longer."""
    period, accum = settings[name], settings["grad_accumulation_steps"]
    if period >= settings["iters"]:
        return 0
    steps = max(1, round(period / accum))
    if steps * accum != period:
        notes.append(f"{name} {period} iterations is taken as {steps} steps of {accum}")
    return steps


def _rates(said: Settings, settings: Settings, steps: int, notes: list[str]) -> dict[str, object]:
    """Schedule and warm-up. mlx-lm's schedule counts updates, too, and not its iterations."""
    schedule = settings["lr_schedule"]
    if not schedule:
        return {"schedule": "constant", "learning_rate": float(settings["learning_rate"])}
    check_keys("lr_schedule", schedule, ("name", "arguments", "warmup", "warmup_init"))
    warmup = schedule.get("warmup", 0)
    check_whole("lr_schedule: warmup", warmup, 0, LARGEST_COUNT)
    shape = _descent(schedule)
    peak = shape["learning_rate"]
    if said.get("learning_rate") not in (None, peak):
        notes.append(f"learning_rate is not used: lr_schedule begins at {peak:g}")
    if warmup:
        first = schedule.get("warmup_init", 0.0)
        check_number("lr_schedule: warmup_init", first, 0)
        if first > peak:
            raise ConfigError(f"lr_schedule: warmup_init {first:g} is above the peak {peak:g}")
        warmup += 1  # mlx-lm's warm-up reaches the peak one update after its last
        shape["warmup_steps"] = warmup
        shape["warmup_from"] = None if first == peak / warmup else float(first)
        if first == 0:
            notes.append("the first update has the learning rate 0: warmup_init")
    if shape.get("decay_steps") == max(1, steps - warmup):
        shape["decay_steps"] = None  # to the end of the run
    return shape


def _descent(schedule: Settings) -> dict[str, object]:
    """`cosine_decay` (init, steps, end) or `linear_schedule` (init, end, steps)."""
    name, arguments = schedule.get("name"), schedule.get("arguments")
    kinds = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(
            f"lr_schedule: {str(name)[:100]!r} has no equal here", cure=f"Use one of {[*kinds]}."
        )
    cosine = name == "cosine_decay"
    if not isinstance(arguments, list) or len(arguments) not in ((2, 3) if cosine else (3,)):
        order = "[init, decay_steps, end]" if cosine else "[init, end, steps]"
        raise ConfigError(f"lr_schedule: arguments of {name} must be {order}")
    if cosine:
        peak, length, floor = [*arguments, 0.0][:3]
    else:
        peak, floor, length = arguments
    check_number("lr_schedule: init", peak, 0)
    check_number("lr_schedule: end", floor, 0)
    check_whole("lr_schedule: steps", length, 1, LARGEST_COUNT)
    if floor > peak:
        raise ConfigError(f"lr_schedule: a rate that rises from {peak:g} to {floor:g}")
    if floor == peak:
        return {"schedule": "constant", "learning_rate": float(peak)}
    return {
        "schedule": kinds[name],
        "learning_rate": float(peak),
        "min_learning_rate": float(floor),
        "decay_steps": length,
    }


def _optimizer(settings: Settings, notes: list[str]) -> dict[str, object]:
    name = settings["optimizer"].lower()
    if name not in OPTIONS:
        raise ConfigError(f"unknown optimizer {name[:100]!r}", cure=f"Use one of {[*OPTIONS]}.")
    check_keys("optimizer_config", settings["optimizer_config"], [*OPTIONS])
    given = settings["optimizer_config"].get(name) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"optimizer_config: {name} must be a mapping, got {str(given)[:100]!r}")
    check_keys(f"optimizer_config: {name}", given, [*OPTIONS[name]])
    options = {**OPTIONS[name], **given}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    for option, value in FIXED.get(name, {}).items():
        if options.pop(option) != value:
            raise ConfigError(
                f"optimizer_config: {name} is made with {option} {value!r} here",
                cure=f"Set {option} to that, or choose another optimizer.",
            )
    if options.get("bias_correction") is False:
        notes.append(f"the first steps of {name} are not corrected, as there: 3 times as large")
    if name == "adam":
        options["weight_decay"] = 0.0  # which it has not
    return {"optimizer": name, **{FIELDS[option]: value for option, value in options.items()}}


def _lora(settings: Settings, notes: list[str]) -> LoRAConfig | None:
    kind, layers = settings["fine_tune_type"], settings["num_layers"]
    if kind == "full":
        if layers != -1:
            raise ConfigError(
                f"fine_tune_type full of the last {layers} layers has no equal here",
                cure="Set num_layers to -1, or fine_tune_type to lora.",
            )
        notes.append("full: embedding, final norm and head train here, too; there only the layers")
        return None
    if kind not in ("lora", "dora"):
        raise ConfigError(f"unknown fine_tune_type {kind[:100]!r}", cure="lora, dora or full.")
    given = settings["lora_parameters"]
    check_keys("lora_parameters", given, ("rank", "scale", "dropout", "keys"))
    missing = [name for name in ("rank", "scale", "dropout") if given.get(name) is None]
    if missing:
        raise ConfigError(f"lora_parameters needs {', '.join(missing)}: mlx-lm has no default then")
    rank, scale = given["rank"], given["scale"]
    check_whole("lora_parameters: rank", rank, 1, LARGEST_RANK)
    check_number("lora_parameters: scale", scale)
    check_number("lora_parameters: dropout", given["dropout"], 0)
    alpha = _alpha(rank, scale)
    notes.append(f"scale {scale:g} with rank {rank} is alpha {alpha:g}")
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=float(given["dropout"]),
        target_modules=_targets(given.get("keys"), notes),
        num_layers=None if layers == -1 else layers,
        seed=settings["seed"],
        use_dora=kind == "dora",
    )


def _alpha(rank: int, scale: float) -> float:
    """scale · rank: the short number of those that floats cannot tell apart."""
    product = scale * rank
    if not math.isfinite(product):
        raise ConfigError(f"lora_parameters: scale {scale!r} times rank {rank} is not finite")
    short = float(f"{product:.12g}")
    return short if abs(short - product) <= EXACT * abs(product) else product


def _targets(keys: object, notes: list[str]) -> str | tuple[str, ...]:
    if keys is None:
        notes.append("no keys: every linear layer; there also embeddings and experts inside layers")
        return ALL_LINEAR
    if not isinstance(keys, list) or not keys or not all(isinstance(k, str) and k for k in keys):
        raise ConfigError(f"lora_parameters: keys must be names, got {str(keys)[:100]!r}")
    bare = [key for key in keys if "." not in key]
    if bare:
        notes.append(f"{', '.join(bare)[:200]}: no whole path inside a layer, so not adapted there")
    return tuple(keys)


def _note_loop(said: Settings, settings: Settings, notes: list[str]) -> None:
    accum, iters = settings["grad_accumulation_steps"], settings["iters"]
    notes.append("rows come in another order, and an epoch's last, smaller batch is trained, too")
    if accum > 1:
        left = f"; the last {iters % accum} make no update there" if iters % accum else ""
        notes.append(f"{iters} iterations are {iters // accum} steps of {accum}{left}")
        notes.append("a micro-batch weighs here what it has of targets; there all weigh alike")
    if settings["val_batches"] != -1:
        notes.append(f"every validation row is used, not {settings['val_batches']} batches")
    for name, what in ELSEWHERE.items():
        if said.get(name) and what:
            notes.append(f"{name} has no effect here: {what}")
