"""Python in fresh processes: what must happen at import, or in two processes at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def one_benchmark() -> Iterator[None]:
    """Wait for the benchmark of another test process: two at once are refused."""
    with FileLock(Path(tempfile.gettempdir()) / f"workbench-tests-{os.getuid()}.lock"):
        yield


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    code: int
    out: str
    err: str


def start(code: str, **env: object) -> subprocess.Popen:
    """Start Python code in a new process; an environment variable of None is removed."""
    merged = {**os.environ, **{name: str(value) for name, value in env.items()}}
    merged = {name: value for name, value in merged.items() if env.get(name, "") is not None}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=merged,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> Finished:
    """Wait for the process."""
    out, err = process.communicate(timeout=seconds)
    return Finished(process.returncode, out.strip(), err.strip())


def run(code: str, **env: object) -> Finished:
    """Run Python code in a new process to its end."""
    return finish(start(code, **env))
