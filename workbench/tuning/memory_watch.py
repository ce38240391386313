"""Between two steps: release memory when it is tight, reload, or stop before swapping."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from workbench.errors import MemoryWarning
from workbench.probes.guard import FINE, OVER
from workbench.probes.memory import read_memory, release_memory
from workbench.tuning.config import StepReport

if TYPE_CHECKING:
    from workbench.tuning.trainer import Trainer

RELOAD_GAP = 10  # steps: memory that a reload does not bring down brings no reload at every step


class MemoryWatch:
    """Acts on what a trainer's guard says of each step."""

    def __init__(self):
        self._warned = False
        self._lean = False  # whether the step began with an empty cache
        self._reloaded_at = 0  # step

    def judge(self, trainer: Trainer, report: StepReport) -> None:
        """Release memory when it is tight; checkpoint and stop when it is over the limit."""
        guard, lean = trainer.guard, self._lean
        verdict = guard.verdict(report)
        self._lean = verdict != FINE
        if not self._lean:
            return
        release_memory()
        text = guard.explain(report)
        if verdict == OVER and (lean or guard.verdict(read_memory()) == OVER):
            saved = f"; checkpoint in {trainer.save_checkpoint()}" if trainer.run else ""
            trainer.stop(f"memory: {text}")
            warnings.warn(f"stopped: {text}{saved}", MemoryWarning, stacklevel=5)
        elif not self._warned:
            self._warned = True
            text = f"{text}; MLX's cache is emptied after each step"
            warnings.warn(text, MemoryWarning, stacklevel=5)

    def reload_if_due(self, trainer: Trainer) -> int | None:
        """Reload model and optimizer from the disk if it is time; returns the bytes given back."""
        config, above = trainer.config, trainer.config.reload_above_bytes
        since = trainer.steps_done - self._reloaded_at
        due = config.reload_every and since >= config.reload_every
        may = above and since >= RELOAD_GAP
        if not (due or may):
            return None
        held = read_memory().process_bytes or 0
        if not due and held <= above:
            return None
        trainer.reload()
        self._reloaded_at = trainer.steps_done
        return held - (read_memory().process_bytes or 0)
