"""Where the time of a step goes, as bars."""

from __future__ import annotations

from workbench.live.figures import (
    BLUE,
    INK,
    ORANGE,
    headline,
    label,
    name_axes,
    new_figure,
    plain,
    png,
)
from workbench.tuning.profiling import MILLI, StepProfile


def draw_profile(profile: StepProfile) -> bytes:
    """Milliseconds of each phase as horizontal bars, the floor below them, as PNG bytes."""
    bars = [(phase, seconds, BLUE) for phase, seconds in profile.seconds.items()]
    if profile.floor_seconds is not None:
        bars.append(("matmul floor", profile.floor_seconds, ORANGE))
    figure = new_figure(12, 1.2 + 0.38 * len(bars))
    axes = figure.subplots()
    longest = max(seconds for _, seconds, _ in bars) / MILLI
    for place, (name, seconds, color) in enumerate(bars):
        axes.barh(place, seconds / MILLI, height=0.66, color=color)
        share = f", {100 * profile.share[name]:.0f} %" if name in profile.share else ""
        text = f"{seconds / MILLI:.3g} ms{share}"
        label(axes, seconds / MILLI + 0.01 * longest, place, text, va="center", color=INK)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], color=INK, fontsize=10)
    axes.set_xlim(0, 1.2 * longest)
    axes.invert_yaxis()
    name_axes(axes, "time (ms a step)", "")
    plain(axes, keep=("bottom",))
    headline(figure, _finding(profile))
    figure.tight_layout()
    return png(figure)


def _finding(profile: StepProfile) -> str:
    phase, share = max(profile.share.items(), key=lambda pair: pair[1])
    text = f"{phase.capitalize()} takes {100 * share:.0f} % of the time"
    if profile.peak_share is None:
        return text
    return f"{text}; the step reaches {100 * profile.peak_share:.0f} % of the matmul peak"
