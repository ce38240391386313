"""Which runs fit together into the machine's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from workbench.errors import ConfigError, check_whole
from workbench.machine import machine_memory
from workbench.runs.grids import in_words
from workbench.runs.sweep_runs import FINISHED, SweepRun

MemoryNeed = int | Callable[[Mapping[str, object]], int] | None


class MemoryBudget:
    """Counts what runs need against what the machine can give.

    Args:
        need: bytes that each run takes, or a function of its parameters; None: what the largest
            run so far took, so that each goes alone until one has finished.
        runs: of the sweep; those that ran before tell what they took.

    Raises:
        ConfigError: a run needs more than the machine has, or the need is no number of bytes.
    """

    def __init__(self, need: MemoryNeed, runs: Iterable[SweepRun]):
        self._given: dict[int, int] = {}  # by the run's id()
        self._largest, self._known = 0, False  # one that failed may have seen only a part
        self._room = _available()
        for run in runs:
            self.learn(run)
            if need is not None and run.state != FINISHED:
                self._given[id(run)] = self._checked(need, run)

    def learn(self, run: SweepRun) -> None:
        """Take in what a run was seen to need."""
        self._largest = max(self._largest, run.result.peak_bytes)
        self._known |= run.state == FINISHED

    def fits(self, run: SweepRun, beside: Iterable[SweepRun]) -> bool:
        """Whether a run may start beside those that run; alone, each one may."""
        others = list(beside)
        if not others:
            self._room = _available()
            return True
        needs = [self._need(each) for each in (run, *others)]
        known = all(need is not None for need in needs)
        return known and (self._room is None or sum(needs) <= self._room)

    def _need(self, run: SweepRun) -> int | None:
        return self._given.get(id(run)) or (self._known and self._largest) or None

    def _checked(self, need: int | Callable, run: SweepRun) -> int:
        value = need(dict(run.parameters)) if callable(need) else need
        check_whole("memory, in bytes,", value, 1)
        if self._room is not None and value > self._room:
            raise ConfigError(
                f"the run with {in_words(run.parameters)} needs {value / 1e9:.2f} GB of memory, "
                f"and this machine has {self._room / 1e9:.2f} GB",
                cure="Leave it out, make it smaller, or end other programs.",
            )
        return value


def _available() -> int | None:
    memory = machine_memory()
    return memory.available_bytes if memory else None
