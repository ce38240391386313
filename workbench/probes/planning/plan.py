"""A memory plan, as numbers, text and HTML."""

from __future__ import annotations

import dataclasses
import functools
import html
from collections.abc import Mapping

import pandas as pd

from workbench.probes.planning.advice import Advice, find_advice, in_words
from workbench.probes.planning.machine import Machine
from workbench.probes.planning.request import Request, held_bytes, phases
from workbench.probes.planning.schedule import Moment

MARGIN = 0.2  # share of the memory below which the plan warns
PROCESS_BYTES = 300_000_000  # Python, MLX and the tokenizer: 150 MB when imported, 280 in training


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryPlan:
    """What a training run will need, and whether a machine has it."""

    request: Request
    machine: Machine
    cache_limit_bytes: int  # that MLX's allocator may keep for reuse
    leak_bytes_per_step: int = 0

    @property
    def phases(self) -> Mapping[str, Moment]:
        """The fullest moment of load, forward and backward, and update."""
        return phases(self.request)

    @property
    def peak_phase(self) -> str:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda name: self.phases[name].total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes in arrays, as `mx.get_peak_memory()` will show."""
        return self.phases[self.peak_phase].total_bytes

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak by part; the arrays' sum is `peak_bytes`, all `process_bytes`."""
        arrays = {k: v for k, v in self.phases[self.peak_phase].parts.items() if v}
        return {**arrays, "cache": self.cache_bytes, "process": self.overhead_bytes}

    @property
    def cache_bytes(self) -> int:
        """Largest cache beside the peak: rows of other lengths leave buffers that do not fit.

        Rows of one length leave next to nothing beside the peak; this is the other extreme.
        """
        freed = (self.peak_bytes - self.resident_bytes) * self.request.length
        return min(self.cache_limit_bytes, freed)

    @property
    def spare_bytes(self) -> int:
        """Memory beside arrays, process and the margin: what a cache could have."""
        return self.comfortable_bytes - self.peak_bytes - self.overhead_bytes

    @property
    def overhead_bytes(self) -> int:
        """What the Python process takes from the same memory."""
        return PROCESS_BYTES if self.machine.process_on_device else 0

    @property
    def process_bytes(self) -> int:
        """Largest size of the process: arrays, cache, Python and its libraries."""
        return self.peak_bytes + self.cache_bytes + self.overhead_bytes

    @property
    def margin(self) -> float:
        """Share of the available memory that stays free; negative if the run does not fit."""
        return 1 - self.process_bytes / self.machine.budget_bytes

    @property
    def fits(self) -> bool:
        """Whether the run fits at all."""
        return self.margin >= 0

    @property
    def comfortable_bytes(self) -> int:
        """The available memory without the margin of 20 %."""
        return int((1 - MARGIN) * self.machine.budget_bytes)

    @property
    def resident_bytes(self) -> int:
        """Weights, adapter and optimizer: what is held between the steps."""
        return sum(held_bytes(self.request).values())

    @property
    def roomy(self) -> bool:
        """Whether it fits with a margin of 20 %."""
        if self.resident_bytes > self.comfortable_bytes:
            return False  # there is no need to walk through a step
        return self.process_bytes <= self.comfortable_bytes

    @property
    def safe_steps(self) -> int | None:
        """Steps until a known leak has used up all but 20 % of the memory; None without a leak.

        The cache is not counted: the allocator gives it back when memory runs short.
        """
        if not self.leak_bytes_per_step:
            return None
        return max(0, int(self.spare_bytes // self.leak_bytes_per_step))

    @functools.cached_property
    def advice(self) -> tuple[Advice, ...]:
        """Changes that would make the run fit with the margin, each planned; none if it does."""
        return () if self.roomy else find_advice(self)

    @property
    def settings(self) -> dict[str, object]:
        """What was planned, under the names of `plan_memory`, `LoRAConfig` and `TrainConfig`."""
        wanted = {k: v for k, v in vars(self.request).items() if k not in ("model", "gpu", "linux")}
        if self.request.mode != "lora":
            for name in ("rank", "target_modules", "num_layers", "dropout"):
                wanted.pop(name)
        return {**wanted, "cache_limit_bytes": self.cache_limit_bytes}

    @property
    def notes(self) -> list[str]:
        """What the reader must know about these numbers."""
        notes, request = [], self.request
        if request.gpu:
            notes.append("GPU: after MLX's source, not measured.")
        if request.bits and not request.gpu:
            notes.append(
                "A CPU computes with plain numbers, unless load_model is told otherwise: "
                'quantise=True for a quantised file, quantise={"bits": 4} for any. It is slower.'
            )
        if not request.model.parted:
            kind = request.model.config.model_type
            notes.append(f"A {kind} network computes logits at every position.")
        if self.machine.available_bytes is None:
            notes.append("Three quarters of the machine's memory are taken to be available.")
        return notes

    def table(self) -> pd.DataFrame:
        """One row a part: bytes in each phase, and at the peak with cache and process."""
        columns = {name: moment.parts for name, moment in self.phases.items()}
        table = pd.DataFrame({**columns, "at the peak": self.parts}).fillna(0).astype("int64")
        table = table[(table != 0).any(axis=1)]
        table.loc["sum"] = table.sum()
        return table

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        machine = self.machine
        verdict = "fits" if self.fits else "does NOT fit"
        return (
            f"{self.request.model.name}, {self.request}: "
            f"{in_words(self.peak_bytes)} of arrays ({self.peak_phase}), "
            f"up to {in_words(self.process_bytes)} with cache and process; {verdict} in "
            f"{in_words(machine.budget_bytes)} of {machine.name} (margin {self.margin:.0%})"
        )

    @property
    def remarks(self) -> list[str]:
        """Warning, safe steps, advice and notes, a line each."""
        lines = []
        if self.fits and not self.roomy:
            lines.append(f"Warning: the margin of {self.margin:.0%} is below {MARGIN:.0%}.")
        if self.safe_steps is not None:
            lines.append(
                f"Leaking {in_words(self.leak_bytes_per_step)} a step, "
                f"{self.safe_steps} steps leave {MARGIN:.0%} of the memory free."
            )
        lines += [f"Try {advice}" for advice in self.advice]
        if not self.roomy and not self.advice:
            lines.append("No change of these settings is enough: take a smaller model.")
        return [*lines, *self.notes]

    def __str__(self) -> str:
        parts = [f"  {name:<12} {in_words(size):>10}" for name, size in self.parts.items()]
        return "\n".join([self.summary, *parts, *self.remarks])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:right'>{in_words(size)}</td></tr>"
            for name, size in self.parts.items()
        )
        remarks = "".join(f"<li>{html.escape(line)}</li>" for line in self.remarks)
        return f"<p><b>{html.escape(self.summary)}</b></p><table>{rows}</table>" + (
            f"<ul>{remarks}</ul>" if remarks else ""
        )
