"""Predict a training run's memory before anything is loaded.

The plan draws the step's graph on shapes alone, as our network, adapter, loss and MLX's derivatives
would record it, puts it in MLX's order of evaluation, and walks through it counting live bytes.
So it has no fitted numbers; only the size of Python and its libraries is measured. The plan knows
the network's dimensions and the settings, and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from workbench.errors import ConfigError, check_number, check_whole
from workbench.probes.planning.advice import FOUR_BITS, Settings, with_settings
from workbench.probes.planning.dimensions import read_model
from workbench.probes.planning.machine import Machine
from workbench.probes.planning.plan import MemoryPlan
from workbench.probes.planning.request import make_request

SHORTEST = 64  # tokens: rows are not suggested shorter


def plan_memory(
    config: object,  # base.config, a config.json as a dict, or the path of one or of its folder
    *,
    mode: str = "lora",  # or "head" (final norm and output matrix), or "full"
    lora: object | None = None,  # a LoRAConfig; None for its defaults
    micro_batch_size: int = 8,  # rows that go through the network together
    length: int = 512,  # positions of the longest row
    supervised: float = 1.0,  # share of positions with a target; logits are computed there only
    grad_accum_steps: int = 1,  # micro-batches a step
    grad_checkpoint: bool = False,  # keep each layer's input only, and compute the layer again
    fused_loss: bool | None = None,  # logits of some positions at a time; None: where possible
    optimizer: str = "adamw",  # or adam, sgd, lion, adafactor, muon, as in TrainConfig
    dtype: mx.Dtype | str | None = None,  # of the base; None for load_model's on that machine
    bits: int | None = None,  # of a quantised base; None for the file's on a GPU, plain on a CPU
    machine: Machine | None = None,  # None for this one
    cache_limit_bytes: int | None = None,  # as in TrainConfig; None for its default there
    leak_bytes_per_step: int = 0,  # of a loop that is known to leak, for `safe_steps`
) -> MemoryPlan:
    """Predict a run's peak memory by part, and whether it fits; nothing is loaded.

    Returns:
        A plan; `peak_bytes` compares with `mx.get_peak_memory()` from the second step on.

    Raises:
        ConfigError: a setting is out of range, or the network's kind cannot be predicted.
    """
    machine, model = _checked(machine), read_model(config)
    if cache_limit_bytes is not None:
        check_whole("cache_limit_bytes", cache_limit_bytes, 0)
    check_number("leak_bytes_per_step", leak_bytes_per_step, 0)
    if bits is None and machine.gpu and mode == "lora":
        bits = model.file_bits
    rows = {"micro_batch_size": micro_batch_size, "length": length, "supervised": supervised}
    how = {"grad_accum_steps": grad_accum_steps, "grad_checkpoint": grad_checkpoint}
    what = {"mode": mode, "bits": bits, "fused_loss": fused_loss, "optimizer": optimizer}
    request = make_request(model, lora, dtype, machine, **rows, **how, **what)
    if cache_limit_bytes is None:
        cache_limit_bytes = machine.cache_limit_bytes(request.parameters().large_trainable_bytes)
    return MemoryPlan(request, machine, cache_limit_bytes, leak_bytes_per_step)


def _checked(machine: Machine | None) -> Machine:
    machine = Machine.here() if machine is None else machine
    if not isinstance(machine, Machine):
        raise ConfigError(
            f"machine must be a Machine, got {machine!r}", cure="Use Machine(name, total_bytes)."
        )
    return machine


def suggest_settings(
    config: object,
    machine: Machine | None = None,
    *,
    lora: object | None = None,
    length: int = 512,
    rows_per_step: int = 8,
) -> MemoryPlan:
    """Settings for LoRA that fit a machine with a margin of 20 %, found by planning.

    What costs least is given up first: rows that go through together, then the speed that gradient
    checkpointing takes, then 16-bit weights (on a GPU), then the rows' length, then the adapter on
    the first layers.

    Args:
        config: as for `plan_memory`.
        machine: default this one.
        lora: a LoRAConfig; None for its defaults.
        length: positions of the longest row, if there is room.
        rows_per_step: rows that a step trains, together or one after the other.

    Returns:
        The plan of the first settings that fit, in `.settings`; of the smallest if none does.

    Raises:
        ConfigError: as `plan_memory`.
    """
    check_whole("rows_per_step", rows_per_step, 1)
    plan = plan_memory(
        config, lora=lora, micro_batch_size=rows_per_step, length=length, machine=machine
    )
    gives: list[Settings] = [{}, {"grad_checkpoint": True}]
    if plan.request.gpu and plan.request.bits is None:
        gives += [{**settings, "bits": FOUR_BITS} for settings in gives]
    for shape in _shapes(plan, length):
        for settings in gives:
            tried = _single_row(with_settings(plan, {**settings, **shape}))
            if tried.roomy:
                return _largest_batch(tried)
    return tried


def _shapes(plan: MemoryPlan, length: int) -> Iterator[Settings]:
    """Ever shorter rows; then, with the shortest, ever fewer trained layers."""
    layers = plan.request.num_layers or plan.request.model.config.num_hidden_layers
    yield {"length": length}
    while length > SHORTEST:
        length = max(SHORTEST, length // 2)
        yield {"length": length}
    while layers > 1:
        layers //= 2
        yield {"length": length, "num_layers": layers}


def _single_row(plan: MemoryPlan) -> MemoryPlan:
    """The plan with its rows one after the other, and what is left as cache."""
    return _with_rows(plan, plan.request.micro_batch_size * plan.request.grad_accum_steps, 1)


def _largest_batch(single: MemoryPlan) -> MemoryPlan:
    """The plan with as many rows together as fit: all, half of them, a quarter, …"""
    rows = size = single.request.grad_accum_steps
    while size > 1:
        tried = _with_rows(single, rows, size)
        if tried.roomy:
            return tried
        size = (size + 1) // 2
    return single


def _with_rows(plan: MemoryPlan, rows: int, size: int) -> MemoryPlan:
    tried = with_settings(plan, {"micro_batch_size": size, "grad_accum_steps": -(-rows // size)})
    cache = 0
    if tried.resident_bytes < tried.comfortable_bytes:
        large = tried.request.parameters().large_trainable_bytes
        cache = max(0, min(tried.machine.cache_limit_bytes(large), tried.spare_bytes))
    return with_settings(tried, {"cache_limit_bytes": cache})
