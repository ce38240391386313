"""What a check of this machine found, and how a person reads it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from workbench.errors import WorkbenchError
from workbench.live.outputs import visible

OK, WARNING, FAILS, ABSENT = "ok", "warning", "fails", "absent"
WIDTH = 100  # columns
ERROR_CUT = 400  # characters of an error's text


@dataclass(frozen=True)
class Settings:
    """What the checks are to look at, and what they hold to be enough."""

    kernel: str = "python3"  # Jupyter's name of the kernel that notebooks run on
    disk_bytes: float = 1e9  # free, in the cache folder's file system and in this one
    memory_bytes: float = 2e9  # free; the quickstart's process takes 1.7 GB
    kernel_seconds: float = 30.0  # for the kernel to start, and for its answer
    fetch: bool = False  # fetch the package-shipped model if it is not in the cache


@dataclass(frozen=True)
class Record:
    """One thing that works, works badly, does not work, or is optional and not there."""

    name: str  # such as "papermill"
    state: str  # "ok", "warning", "fails" or "absent"
    seen: str  # what was found, with its numbers
    cure: str = ""

    def __str__(self) -> str:
        start = f"{self.state:<8} {self.name:<11} "
        indent = " " * len(start)
        lines = [_fill(self.seen, start, indent)]
        if self.cure:
            lines.append(_fill(self.cure, f"{indent}→ ", indent))
        return "\n".join(lines)


def _fill(text: str, first: str, indent: str) -> str:
    """Lines of `WIDTH` columns; paths and options stay whole, to be copied."""
    shape = {"initial_indent": first, "subsequent_indent": indent}
    return textwrap.fill(
        visible(text), WIDTH, break_long_words=False, break_on_hyphens=False, **shape
    )


Check = Callable[[Settings], Record]


def examine(checks: Iterable[tuple[str, Check]], settings: Settings) -> Iterator[Record]:
    """Run checks one after the other. One that raises has failed, with the error as its finding.

    Args:
        checks: (name, function) of each.
        settings: handed to each.
    """
    for name, check in checks:
        try:
            yield check(settings)
        except WorkbenchError as error:
            where = f"{error.where}: " if error.where else ""
            yield Record(name, FAILS, _line(f"{where}{error.what}"), error.cure)
        except Exception as error:  # whatever a broken installation raises is what is looked for
            yield Record(name, FAILS, _line(f"{type(error).__name__}: {error}"))


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= ERROR_CUT else line[:ERROR_CUT] + "…"
