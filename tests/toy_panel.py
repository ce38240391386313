"""A view that remembers, and reports made up for charts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from workbench.live.panel import LivePanel
from workbench.live.views import Face
from workbench.tuning.config import StepReport


def toy_report(step: int, loss: float = 1.0, **changes: object) -> StepReport:
    """A report of a step that was never made."""
    memory = {"active_bytes": 6e8, "cache_bytes": 1e9, "peak_bytes": 9e8, "process_bytes": 2e9}
    rates = {"learning_rate": 1e-3, "grad_norm": 1.0, "clipped_grad_norm": 1.0}
    counts = {"step": step, "total_steps": 30, "epoch": 1, "num_tokens": 9, "num_input_tokens": 90}
    speed = {"step_seconds": 0.5, "tokens_per_second": 180.0}
    return StepReport(**{**counts, **rates, **speed, **memory, "loss": loss, **changes})


class RecordingView:
    """Shows nothing; keeps what it was told, and does something at chosen numbers of steps.

    Args:
        acts: steps done → what to do, once, when the panel shows them.
    """

    due, draw_seconds = True, 0.0

    def __init__(self, acts: dict[int, Callable[[], object]] | None = None):
        self.opened, self.closed, self.states, self.notes = None, None, [], []
        self.acts = dict(acts or {})

    def open(self, face: Face) -> None:
        self.opened = face

    def refresh(self, face: Face, now: bool = False) -> None:
        self.states.append((face.status.state, face.status.steps_done))
        self.notes.append(face.status.note)
        self.acts.pop(face.status.steps_done, lambda: None)()

    def close(self, face: Face) -> None:
        self.closed = face


def watch(panel: LivePanel, acts: dict[int, Callable[[], object]] | None = None) -> RecordingView:
    """Watch to the end with a recording view; returns it."""
    view = RecordingView(acts)
    panel._choose_view = lambda: view
    asyncio.run(panel.watch())
    return view
