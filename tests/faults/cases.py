"""One case: an action in a process of its own, its outcome, and the folder before and after."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.process import ROOT

COLUMNS = ("cases", "typed errors", "correct results", "untyped errors", "deaths", "stray files")
KINDS = {
    "typed error": "typed errors",
    "result": "correct results",
    "untyped error": "untyped errors",
    "death": "deaths",
}
TABLE: dict[str, Counter] = {}  # class of faults → column → count


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    kind: str  # typed error, untyped error, result or death
    type: str = ""  # of the error, or the signal
    text: str = ""
    value: object = None


class Server:
    """The process that forks for every case."""

    def __init__(self, *modules: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )

    def run(self, action: str, argument: object) -> Outcome:
        """Run `module:function` on a JSON argument in a process of its own."""
        module, _, name = action.rpartition(":")
        self._process.stdin.write(json.dumps([module, name, argument]) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder, with what it holds; nothing is followed or opened but files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = f"{status.st_size} {hashlib.sha256(_head(path)).hexdigest()}"
        found[str(path.relative_to(folder))] = f"{kind:o} {content}"
    return found


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1 << 20)


def run_case(server: Server, fault: str, action: str, argument: object, folder: Path) -> Outcome:
    """Run a case, count it in the table, and require a decent end and an unchanged folder."""
    before = snapshot(folder)
    outcome = server.run(action, argument)
    after = snapshot(folder)
    count(fault, outcome.kind, len(after.keys() - before.keys()))
    assert outcome.kind in ("typed error", "result"), outcome
    assert after == before
    return outcome


def count(fault: str, kind: str, stray_files: int = 0) -> None:
    """Add one case to the table: how it ended, and the files that it left behind."""
    add(fault, Counter({"cases": 1, KINDS[kind]: 1, "stray files": stray_files}))


def add(fault: str, row: Mapping[str, int]) -> None:
    """Add a row of counts to the table."""
    TABLE.setdefault(fault, Counter()).update(row)


def table() -> list[str]:
    """The table of results, a line a class of faults."""
    width = max(map(len, TABLE), default=0)
    head = f"{'class':{width}}  " + "  ".join(COLUMNS)
    lines = [
        f"{fault:{width}}  " + "  ".join(f"{row[name]:>{len(name)}}" for name in COLUMNS)
        for fault, row in TABLE.items()
    ]
    return [head, *lines]
