"""How often to draw, and how long training will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COST_FACTOR = 15  # a refresh that takes 0.1 s is not followed by another within 1.5 s
FREE = 0.3  # seconds that refreshes may take in all before their share counts
RECENT = 50  # steps whose mean time stands for those to come


class Pace:
    """Says when the next refresh is due, and counts what refreshes cost.

    Three bounds hold: a shortest time between two refreshes, a multiple of what the last one took,
    and a share of all the time. The first refresh, which loads fonts, delays nothing.

    Args:
        shortest: seconds between two refreshes, at least.
        share: of the time since the beginning that refreshes may take in all.
        clock: seconds that only rise.
    """

    def __init__(
        self, shortest: float, share: float, clock: Callable[[], float] = time.perf_counter
    ):
        self.shortest, self.share = shortest, share
        self.seconds = 0.0  # spent in all
        self._first = 0.0  # of these on the first refresh
        self._clock, self._began, self._next = clock, clock(), -math.inf

    @property
    def due(self) -> bool:
        """Whether it is time to refresh."""
        now = self._clock()
        budget = FREE + self._first + self.share * (now - self._began)
        return now >= self._next and self.seconds <= budget

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Around a refresh."""
        started = self._clock()
        try:
            yield
        finally:
            now = self._clock()
            cost, wait = now - started, self.shortest
            if self._next == -math.inf:
                self._first = cost
            else:
                wait = max(wait, COST_FACTOR * cost)
            self.seconds += cost
            self._next = now + wait


class Forecast:
    """The time that the rest of a run will take, from what its parts took so far.

    Steps, validations and samples are counted apart: they come at different times.
    """

    def __init__(self):
        self._steps: list[float] = []
        self._extras: dict[str, list[float]] = {"validation": [], "samples": []}
        self._around = 0.0  # seconds of drawing and waiting
        self._made = 0

    def add_step(self, seconds: float) -> None:
        """An update took so long, without its validation."""
        self._made += 1
        self._steps = [*self._steps[1 - RECENT :], seconds]

    def add_extra(self, kind: str, seconds: float) -> None:
        """A validation, or the samples of one step, took so long."""
        self._extras[kind].append(seconds)

    def add_around(self, seconds: float) -> None:
        """Time that belongs to no step: drawing, answering the notebook."""
        self._around += seconds

    def remaining(self, steps: int, extras: dict[str, int]) -> tuple[float, bool] | None:
        """Seconds for so many steps and extras, and whether that is all.

        It is not all where a kind is still to come that was never seen. None before a step.
        """
        if not self._steps:
            return None
        seconds = steps * (sum(self._steps) / len(self._steps) + self._around / self._made)
        complete = True
        for kind, count in extras.items():
            seen = self._extras[kind]
            if seen:
                seconds += count * sum(seen) / len(seen)
            elif count:
                complete = False
        return seconds, complete


def times_between(done: int, total: int, every: int) -> int:
    """How often something comes that is due every so many steps, and after the last one."""
    if done >= total:
        return 0
    return total // every - done // every + bool(total % every) if every else 1


def in_words(seconds: float) -> str:
    """A time as a clock shows it: 0:07, 12:30, 1:02:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
