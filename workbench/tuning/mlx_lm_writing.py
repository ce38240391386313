"""A run of ours as a YAML for `python -m mlx_lm lora --config`."""

from __future__ import annotations

import os
import reprlib

import mlx.nn as nn
import yaml

from workbench.errors import ConfigError
from workbench.models.files import replacing
from workbench.models.structure import find_layers
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import ALL_LINEAR, LoRAConfig, find_targets
from workbench.tuning.mlx_lm_settings import FIELDS, FIXED, OPTIONS
from workbench.tuning.mlx_lm_yaml import MlxLmRun

SCHEDULES = ("constant", "linear", "cosine")


def write_mlx_lm_yaml(
    path: str | os.PathLike, run: MlxLmRun, network: nn.Module | None = None
) -> tuple[str, ...]:
    """Write a run as a YAML that mlx-lm trains with.

    `read_mlx_lm_yaml` gives it back, but for what the notes name and for settings that mlx-lm has
    no word for, such as keep_checkpoints.

    Args:
        path: the file, which is replaced.
        run: its `train.steps` must be given, since mlx-lm counts iterations.
        network: the base model, which makes whole paths of names such as "q_proj"; mlx-lm adapts
            nothing by the bare name.

    Returns:
        What will differ; the file begins with the same lines as comments.

    Raises:
        ConfigError: a setting has no equal in mlx-lm.
        FileFormatError: the file cannot be written.
    """
    if not isinstance(run, MlxLmRun):
        raise ConfigError(
            f"a run must be an MlxLmRun, got {reprlib.repr(run)}",
            cure="wb.MlxLmRun(train, lora) makes one of a TrainConfig and a LoRAConfig.",
        )
    _require_equals(run.train)
    content = {**_about(run), **_loop(run.train), "lora_parameters": _lora(run.lora, network)}
    content = {name: value for name, value in content.items() if value is not None}
    notes = _notes(run.train, run.lora)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(f"# {n}\n" for n in notes) + text, encoding="utf-8")
    return notes


def _about(run: MlxLmRun) -> dict[str, object]:
    lora = run.lora
    return {
        "model": run.model,
        "train": True,
        "data": run.data,
        "adapter_path": run.adapter_path,
        "fine_tune_type": "full" if lora is None else "dora" if lora.use_dora else "lora",
        "num_layers": -1 if lora is None or lora.num_layers is None else lora.num_layers,
        "max_seq_length": run.max_length,
        "mask_prompt": run.train_on == "last",
    }


def _loop(train: TrainConfig) -> dict[str, object]:
    accum, iters = train.grad_accum_steps, train.steps * train.grad_accum_steps
    return {
        "seed": train.seed,
        "batch_size": train.micro_batch_size,
        "grad_accumulation_steps": accum,
        "iters": iters,
        "steps_per_report": accum,
        "steps_per_eval": min(train.valid_every * accum, iters) or iters,
        "val_batches": -1,
        "save_every": min(train.checkpoint_every * accum, iters) or iters,
        "grad_checkpoint": train.grad_checkpoint,
        "learning_rate": float(train.learning_rate),
        "lr_schedule": _schedule(train),
        "optimizer": train.optimizer,
        "optimizer_config": {train.optimizer: _options(train)},
    }


def _require_equals(train: TrainConfig) -> None:
    """Raise ConfigError for the settings without which the run would be another."""
    if train.steps is None:
        raise ConfigError("steps must be given: mlx-lm counts no epochs", cure="Set steps.")
    if train.optimizer not in OPTIONS:
        cure = f"Use one of {[*OPTIONS]}."
        raise ConfigError(f"mlx_lm.lora has no optimizer {train.optimizer!r}", cure=cure)
    if train.schedule not in SCHEDULES:
        cure = f"Use one of {SCHEDULES}."
        raise ConfigError(f"mlx_lm.lora has no schedule {train.schedule!r}", cure=cure)
    if train.lora_plus_ratio != 1:
        raise ConfigError("mlx_lm.lora has no lora_plus_ratio", cure="Set it to 1.")
    if train.warmup_steps == 1:
        raise ConfigError(
            "mlx_lm.lora's shortest warm-up is of 2 updates, warmup_steps is 1",
            cure="Set warmup_steps to 0, which begins at the same rate, or to 2.",
        )


def _schedule(train: TrainConfig) -> dict[str, object] | None:
    """The same rate at every update; mlx-lm's warm-up counts one update less than ours."""
    peak, warmup = float(train.learning_rate), train.warmup_steps
    floor = min(float(train.min_learning_rate), peak)
    length = train.decay_steps or max(1, train.steps - warmup)
    if train.schedule == "constant":
        if not warmup:
            return None
        content = {"name": "linear_schedule", "arguments": [peak, peak, 1]}
    elif train.schedule == "linear":
        content = {"name": "linear_schedule", "arguments": [peak, floor, length]}
    else:
        content = {"name": "cosine_decay", "arguments": [peak, length, floor]}
    if warmup:
        first = peak / warmup if train.warmup_from is None else min(train.warmup_from, peak)
        content.update(warmup=warmup - 1, warmup_init=float(first))
    return content


def _options(train: TrainConfig) -> dict[str, object]:
    fixed = FIXED.get(train.optimizer, {})
    ours = {o: getattr(train, FIELDS[o]) for o in OPTIONS[train.optimizer] if o not in fixed}
    options = {**fixed, **ours}
    return {o: list(v) if isinstance(v, tuple) else v for o, v in options.items() if v is not None}


def _lora(lora: LoRAConfig | None, network: nn.Module | None) -> dict[str, object] | None:
    if lora is None:
        return None
    content = {"rank": lora.rank, "scale": float(lora.scale), "dropout": float(lora.dropout)}
    if lora.target_modules == ALL_LINEAR:
        return content
    names = lora.target_modules
    names = [names] if isinstance(names, str) else list(names)
    if network is not None:
        layers, _ = find_layers(network)
        paths = [path.removeprefix(f"{layers}.") for path in find_targets(network, lora)]
        names = list(dict.fromkeys(path.partition(".")[2] for path in paths))
    bare = [name for name in names if "." not in name]
    if bare:
        raise ConfigError(
            f"mlx-lm adapts nothing by {', '.join(bare)}: its keys are whole paths inside a layer",
            cure="Name them so, as 'self_attn.q_proj', or give the network.",
        )
    return {**content, "keys": names}


def _notes(train: TrainConfig, lora: LoRAConfig | None) -> tuple[str, ...]:
    notes = []
    if train.max_grad_norm:
        notes.append(f"mlx-lm does not clip: gradients above norm {train.max_grad_norm:g} differ")
    if train.on_bad_step == "skip":
        notes.append("mlx-lm does not skip steps that are not finite: they ruin the weights")
    if train.patience:
        notes.append("mlx-lm does not stop early: patience is lost")
    if train.grad_accum_steps > 1:
        notes.append("mlx-lm weighs micro-batches alike, whatever they have of targets")
    if lora is None:
        notes.append("mlx-lm's full leaves embedding, final norm and head as they are")
    elif lora.seed != train.seed:
        notes.append(f"mlx-lm has one seed: {train.seed}, and not {lora.seed} for lora_a")
    if lora is not None and lora.use_rslora:
        notes.append(f"rsLoRA is written as its scale, {lora.scale:g}")
    if train.optimizer == "muon" and (lora is None or lora.use_dora):
        notes.append("mlx-lm's muon updates vectors and tables by itself, ours by AdamW")
    return tuple(notes)
