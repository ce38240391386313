"""The panel's numbers as HTML: status, progress, and a tile for each figure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.errors import ConfigError
from workbench.live.history import History
from workbench.live.outputs import literal
from workbench.live.pace import in_words
from workbench.probes.leaks import find_leak

GIGA, MEGA = 1e9, 1e6
RECENT = 20  # steps whose median throughput is shown
NOTHING = "–"
WIDTH = 1166  # pixels: as wide as the picture
# Plain values only: JupyterLab takes variables out of a notebook that it does not trust.
FONT = "font-family:system-ui,sans-serif;font-variant-numeric:tabular-nums"
GROUND = "background-color:rgba(127,127,127,0.14)"
TRACK = "rgba(127,127,127,0.35)"
BAR = "#2f6fde"
ALARM = "#d1383d"  # at least 4.5 : 1 against white and 3 : 1 against the dark theme's tiles


@dataclass(frozen=True)
class Status:
    """What a run is doing."""

    state: str  # "Training", "Paused", "Finished", "Stopped: …", "Failed: …"
    steps_done: int
    total_steps: int
    elapsed: float  # seconds of training, without pauses
    remaining: tuple[float, bool] | None = None  # seconds, and whether that is all
    note: str = ""  # what a request led to

    @property
    def share(self) -> float:
        """Steps done, from 0 to 1."""
        return min(1.0, self.steps_done / self.total_steps)

    def times(self) -> str:
        """Elapsed and remaining time, in words."""
        gone = f"{in_words(self.elapsed)} elapsed"
        if self.remaining is None or self.steps_done >= self.total_steps:
            return gone
        seconds, complete = self.remaining
        return f"{gone}, {'about' if complete else 'at least'} {in_words(seconds)} left"

    def __str__(self) -> str:
        note = f" · {self.note}" if self.note else ""
        return f"{self.state} · step {self.steps_done}/{self.total_steps} · {self.times()}{note}"


def heading_html(status: Status, history: History) -> str:
    """Status line, progress bar and tiles; they wrap where the window is narrow."""
    color = f"color:{ALARM};" if status.state.startswith("Failed") else ""
    percent = 100 * status.share
    cells = "".join(_tile(*tile) for tile in tiles(status, history))
    return (
        f'<div style="{FONT};font-size:13px;line-height:1.4;max-width:{WIDTH}px;margin:2px 0">'
        '<div style="display:flex;flex-wrap:wrap;gap:2px 16px;align-items:baseline">'
        f'<strong style="{color}font-size:15px">{literal(status.state)}</strong>'
        f"<span>{status.times()}</span>"
        f'<span role="status" style="opacity:.85;min-width:0">{literal(status.note)}</span></div>'
        f'<div role="progressbar" aria-label="steps" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}" style="height:6px;border-radius:3px;margin:6px 0 8px;'
        f'background-color:{TRACK};overflow:hidden">'
        f'<div style="width:{percent:.2f}%;height:6px;background-color:{BAR}"></div></div>'
        '<div style="display:grid;grid-template-columns:'
        "repeat(auto-fill,minmax(max(150px,15.5%),1fr));"
        f'gap:6px">{cells}</div></div>'
    )


def tiles(status: Status, history: History) -> list[tuple[str, str, str]]:
    """The tiles: name, value with its unit, and a detail."""
    step = f"{status.steps_done} / {status.total_steps}"
    last = history.last
    if last is None:
        names = ("train loss", "validation loss", "learning rate", "gradient norm", "tokens/s")
        names = (*names, "MLX active", "MLX cache", "MLX peak", "process", "available", "leak")
        return [("step", step, ""), *((name, NOTHING, "") for name in names)]
    return [
        ("step", step, f"epoch {last.epoch}{_share(last.epoch_share)}"),
        ("train loss", f"{history['smooth loss'][-1]:.4f}", f"this step {last.loss:.4f}"),
        _validation(history),
        ("learning rate", f"{last.learning_rate:.3g}", f"at step {last.step}"),
        ("gradient norm", f"{last.grad_norm:.3g}", f"clipped {last.clipped_grad_norm:.3g}"),
        (
            "tokens/s",
            f"{np.median(history['speed'][-RECENT:]):.0f}",
            f"step {last.step_seconds:.2f} s",
        ),
        ("MLX active", _memory(last.active_bytes), "arrays in use"),
        ("MLX cache", _memory(last.cache_bytes), "kept for reuse"),
        ("MLX peak", _memory(last.peak_bytes), "of the arrays"),
        ("process", _memory(last.process_bytes), _limit(history)),
        ("available", _memory(last.available_bytes), "before the machine swaps"),
        _leak(history),
    ]


def _tile(name: str, value: str, detail: str) -> str:
    return (
        f'<div style="{GROUND};border-radius:4px;padding:5px 9px 6px;min-width:0">'
        f'<div style="font-size:11px;opacity:.8">{name}</div>'
        f'<div style="font-size:17px;font-weight:600;white-space:nowrap">{value}</div>'
        f'<div style="font-size:11px;opacity:.8;min-height:15px">{detail}</div></div>'
    )


def _validation(history: History) -> tuple[str, str, str]:
    best, valid = history.best_validation, history["valid"]
    if best is None:
        return "validation loss", NOTHING, "none yet"
    now = valid[np.isfinite(valid)][-1]
    return "validation loss", f"{now:.4f}", f"best {best[1]:.4f} at {best[0]}"


def _share(used: float | None) -> str:
    return "" if used is None else f", {used:.0%} of it"


def _memory(count: float | None) -> str:
    if count is None:
        return NOTHING
    if count >= GIGA:
        return f"{count / GIGA:.2f} GB"
    return f"{count / MEGA:.{0 if count >= 100 * MEGA else 1}f} MB"


def _limit(history: History) -> str:
    limit = history["limit"][-1]
    return f"limit {_memory(limit)}" if np.isfinite(limit) else "no limit"


def _leak(history: History) -> tuple[str, str, str]:
    """Slope of the arrays in use."""
    try:
        leak = find_leak(history["active"])
    except ConfigError:  # too few readings
        return "leak", NOTHING, "too early to say"
    slope = f"{leak.slope / MEGA:+.2f}".replace("-", "−")
    unsigned = slope[1:] if slope[1:] == "0.00" else slope
    return "leak", f"{unsigned} MB", f"a step: {leak.verdict}"
