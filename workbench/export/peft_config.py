"""PEFT's adapter_config.json: what of it can be represented here, and what is refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping

import mlx.nn as nn

from workbench.errors import ConfigError
from workbench.export.attached import common_place
from workbench.models.structure import find_layers
from workbench.tuning.lora import ALL_LINEAR, LARGEST_RANK, LoRAConfig, find_targets
from workbench.tuning.lora_layers import LoRALinear

# They say where an adapter came from or how it was made, not what it computes.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
READ_HERE = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Ways to start that leave the base model's weights as they are; pissa, olora, corda, loftq, lora_ga
# and whatever comes next may subtract the start from them.
PLAIN_STARTS = (True, False, None, "gaussian")
MERGE = "In PEFT, merge_and_unload makes a plain model of any adapter."


def check_config(config: Mapping[str, object]) -> None:
    """Raise ConfigError naming the first setting that cannot be represented here."""
    for key, allowed in (
        ("peft_type", ("LORA",)),
        ("task_type", ("CAUSAL_LM", None)),
        ("bias", ("none", None)),
        ("init_lora_weights", PLAIN_STARTS),
        ("use_rslora", (True, False, None)),
        ("use_dora", (True, False, None)),
    ):
        value = config.get(key)
        if isinstance(value, list | dict | int) and not isinstance(value, bool):
            _refuse(key, value)
        if value not in allowed:
            _refuse(key, value)
    for key, ours in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or any(v != config.get(ours) for v in pattern.values()):
            _refuse(key, pattern)  # modules that differ from one another
    for key in sorted(config.keys() - WITHOUT_EFFECT - READ_HERE):
        if config[key] not in (None, False, "", [], {}):  # as are PEFT's defaults, today's and new
            _refuse(key, config[key])


def _refuse(key: str, value: object) -> None:
    raise ConfigError(
        f"{key} is {reprlib.repr(value)}, which cannot be represented here",
        cure=f"Read are LoRA, rsLoRA and DoRA of one rank on linear layers. {MERGE}",
    )


def is_pattern(targets: object) -> bool:
    """Whether target_modules is a regular expression; nobody runs a stranger's."""
    return isinstance(targets, str) and targets != ALL_LINEAR


def read_config(
    config: Mapping[str, object], model: nn.Module, named: Collection[str]
) -> LoRAConfig:
    """The `LoRAConfig` that a checked configuration describes for this network.

    Args:
        config: adapter_config.json.
        model: the network that the adapter is for.
        named: paths of the modules that the file of weights names; they stand for the modules
            where target_modules is a regular expression.

    Raises:
        ConfigError: a number is out of range, a module is no linear layer of this network, or the
            last N layers have another module of the same name.
    """
    rank = config.get("r")
    if isinstance(rank, int) and rank > LARGEST_RANK:
        raise ConfigError(f"r is beyond reason: {rank}")
    settings = {
        "rank": rank,
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout") or 0.0,
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
    }
    probe = LoRAConfig(**settings)  # its refusals name the number
    targets = config.get("target_modules")
    if targets == ALL_LINEAR:
        chosen = set(find_targets(model, probe))
    elif is_pattern(targets):
        chosen = set(named)
        if not chosen:
            raise ConfigError(
                "target_modules is a regular expression, and no tensor names a module"
            )
    else:
        chosen = _matched(config, targets, model)
    return _as_config(model, chosen, settings)


def _matched(config: Mapping[str, object], targets: object, model: nn.Module) -> set[str]:
    """Paths that PEFT adapts: those equal to a target, and in the named layers those that end so.

    As in PEFT 0.21 (tuners_utils.check_target_module_exists).
    """
    named = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not named or not targets:
        raise ConfigError(f"target_modules must name modules, got {reprlib.repr(targets)}")
    wanted, layers = set(targets), _chosen_layers(config, model)
    paths = [path for path, _ in model.named_modules() if path]
    inside = tuple(f"{p}." for p, m in model.named_modules() if isinstance(m, LoRALinear))
    chosen = set()
    for path in paths:
        if path.startswith(inside) and inside:
            continue  # parts of an adapter that is attached already
        parts = path.split(".")
        ends = {".".join(parts[start:]) for start in range(1, len(parts))}
        number = next((int(part) for part in parts if part.isdigit()), None)
        if path in wanted or (ends & wanted and (layers is None or number in layers)):
            chosen.add(path)
    if not chosen:
        find_targets(model, LoRAConfig(target_modules=sorted(wanted)))  # says what there is
        raise ConfigError(f"target_modules {reprlib.repr(targets)} match nothing in these layers")
    return chosen


def _chosen_layers(config: Mapping[str, object], model: nn.Module) -> set[int] | None:
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    name = find_layers(model)[0].rpartition(".")[2]
    if pattern not in (None, "", [], name, [name]):
        _refuse("layers_pattern", pattern)
    if layers in (None, []):
        return None
    listed = layers if isinstance(layers, list) else [layers]
    if not all(type(number) is int for number in listed):
        raise ConfigError(f"layers_to_transform must be numbers, got {reprlib.repr(layers)}")
    return set(listed)


def _as_config(
    model: nn.Module, chosen: Collection[str], settings: Mapping[str, object]
) -> LoRAConfig:
    """The configuration that adapts exactly the chosen modules."""
    linear = set(find_targets(model, LoRAConfig()))
    strangers = sorted(set(chosen) - linear)
    if strangers:
        raise ConfigError(
            f"target_modules name {reprlib.repr(strangers[0])}, which is no linear layer inside "
            "this network's layers",
            cure="Adapted are linear layers of the decoder layers, not embeddings or the head.",
        )
    names, first, total = common_place(model, chosen, MERGE)
    return LoRAConfig(**settings, target_modules=names, num_layers=total - first)
