"""Which change of the settings would make a run fit: each is planned before it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.probes.planning.plan import MemoryPlan

SHORTER_BY = 32  # tokens
FOUR_BITS = 4
GIGA, MEGA = 1e9, 1e6

Settings = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change, and the plan with it."""

    settings: Settings  # what to change, under the names of `plan_memory`
    plan: MemoryPlan

    def __str__(self) -> str:
        changes = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{changes}: {in_words(self.plan.process_bytes)}, margin {self.plan.margin:.0%}"


def in_words(num_bytes: float) -> str:
    """A size as people read it."""
    if num_bytes < GIGA:
        return f"{num_bytes / MEGA:.1f} MB"
    return f"{num_bytes / GIGA:.2f} GB"


def find_advice(plan: MemoryPlan) -> tuple[Advice, ...]:
    """The mildest change of each kind after which the run fits with the margin.

    If no single one is enough: all of them together, as far as it takes, as one.
    """
    found = [Advice(*chosen) for lever in levers(plan) if (chosen := _mildest(plan, lever))]
    if found:
        return tuple(found)
    combined = _combined(plan)
    return (Advice(combined, with_settings(plan, combined)),) if combined else ()


def _combined(plan: MemoryPlan) -> Settings:
    """The strongest of each kind until it fits, then each as mild as the others allow.

    The last ones, which cost most, are made mild first.
    """
    chosen: list[tuple[Sequence[Settings], Settings]] = []
    for lever in levers(plan):
        chosen.append((lever, lever[-1]))
        if with_settings(plan, _merged(chosen)).roomy:
            break
    else:
        return {}
    for place in reversed(range(len(chosen))):
        lever = chosen[place][0]
        others = [*chosen[:place], *chosen[place + 1 :]]
        changed = with_settings(plan, _merged(others))
        mild = {} if changed.roomy else _mildest(changed, lever)[0]
        chosen[place] = (lever, mild)
    return _merged(chosen)


def _merged(chosen: Sequence[tuple[Sequence[Settings], Settings]]) -> Settings:
    return {name: value for _, settings in chosen for name, value in settings.items()}


def with_settings(plan: MemoryPlan, settings: Settings) -> MemoryPlan:
    """The plan with other settings."""
    own = {k: v for k, v in settings.items() if k == "cache_limit_bytes"}
    rest = {k: v for k, v in settings.items() if k not in own}
    return dataclasses.replace(plan, request=dataclasses.replace(plan.request, **rest), **own)


def levers(plan: MemoryPlan) -> Iterator[Sequence[Settings]]:
    """Kinds of change that this run allows; each from the mildest to the strongest."""
    request, layers = plan.request, plan.request.model.config.num_hidden_layers
    if plan.cache_limit_bytes:
        spare = max(0, min(plan.cache_limit_bytes, plan.spare_bytes))
        yield [{"cache_limit_bytes": spare}]
    rows = request.micro_batch_size * request.grad_accum_steps
    sizes = range(request.micro_batch_size - 1, 0, -1)
    if sizes:
        yield [{"micro_batch_size": n, "grad_accum_steps": -(-rows // n)} for n in sizes]
    if not request.grad_checkpoint:
        yield [{"grad_checkpoint": True}]
    if request.model.parted and not request.fuses_loss:
        yield [{"fused_loss": True}]
    if request.mode == "full":
        yield [{"mode": "lora"}]
    packs = request.mode == "lora" and (request.bits or 16) > FOUR_BITS
    if packs and request.gpu:
        yield [{"bits": FOUR_BITS}]
    lengths = range((request.length - 1) // SHORTER_BY * SHORTER_BY, 0, -SHORTER_BY)
    if lengths:
        yield [{"length": length} for length in lengths]
    fewer = range((request.num_layers or layers) - 1, 0, -1)
    if request.mode == "lora" and fewer:
        yield [{"num_layers": number} for number in fewer]
    if packs and not request.gpu:  # a CPU is tens of times slower with them: after all else
        yield [{"bits": FOUR_BITS}]


def _mildest(plan: MemoryPlan, lever: Sequence[Settings]) -> tuple[Settings, MemoryPlan] | None:
    """The first setting that fits with the margin, by bisection; None if even the last does not."""
    if not with_settings(plan, lever[-1]).roomy:
        return None
    low, high = 0, len(lever) - 1
    while low < high:
        middle = (low + high) // 2
        if with_settings(plan, lever[middle]).roomy:
            high = middle
        else:
            low = middle + 1
    return lever[low], with_settings(plan, lever[low])
