"""A peer's process: started, asked, and always ended."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from workbench.backend import on_gpu
from workbench.benchmarks.workloads import (
    MLX_LM,
    MLX_LM_BLAS,
    OURS,
    PEERS,
    TORCH,
    TORCH_BF16,
)
from workbench.blas import SPIN_EXPONENT, load_blas
from workbench.errors import BenchmarkError

SCRIPTS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parent.parent.parent
TORCH_NEEDS = ("torch", "peft", "transformers")
REPLY_SECONDS = 900  # a step of the slowest peer takes 200
SPIN = "OPENBLAS_THREAD_TIMEOUT"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "PYTHONFAULTHANDLER": "1",
}


def left_out() -> dict[str, str]:
    """The peers that cannot take part on this machine, and why."""
    out = {}
    missing = [name for name in TORCH_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (pip install -e .[benchmarks])"
        out |= dict.fromkeys((TORCH, TORCH_BF16), reason)
    if not is_slow_without_blas():
        out[MLX_LM_BLAS] = "MLX needs no other BLAS here: it is mlx-lm as its wheel comes"
    return out


def is_slow_without_blas() -> bool:
    """Whether MLX computes on a CPU with a BLAS that we gave it."""
    return bool(load_blas().path) and not on_gpu()


def _command(peer: str) -> list[str]:
    arguments = {
        OURS: ["our_peer.py"],
        MLX_LM: ["mlx_lm_peer.py"],
        MLX_LM_BLAS: ["mlx_lm_peer.py", load_blas().path],
        TORCH: ["torch_peer.py", "float32"],
        TORCH_BF16: ["torch_peer.py", "bfloat16"],
    }
    script, *rest = arguments[peer]
    return [sys.executable, str(SCRIPTS / script), *rest]


def _environment(peer: str) -> dict[str, str]:
    environment = {**os.environ, **QUIET}
    environment.pop(SPIN, None)
    if peer == MLX_LM_BLAS:
        environment[SPIN] = os.environ.get(SPIN, SPIN_EXPONENT)
    if peer == OURS:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


class Worker:
    """A peer in a process of its own; a context manager that ends it whatever happens.

    Args:
        peer: one of `PEERS`.
        command: what is started instead of the peer's own script.
        environment: variables of its own.
    """

    def __init__(
        self,
        peer: str,
        command: list[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        assert peer in PEERS, peer
        self.peer = peer
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            command or _command(peer),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**_environment(peer), **(environment or {})},
            text=True,
            start_new_session=True,  # Ctrl-C is for the conductor, which ends this one
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def send(self, do: str, **values: object) -> None:
        """Ask for something without waiting."""
        with contextlib.suppress(BrokenPipeError):  # its death is told by `receive`
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()

    def receive(self, seconds: float = REPLY_SECONDS) -> dict:
        """The answer to what was asked first.

        Raises:
            BenchmarkError: the process died, or is silent for too long; with its last words.
        """
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise BenchmarkError(
                f"has not answered for {seconds:g} s{self._last_words()}", where=self.peer
            ) from None
        if not line:
            code = self._process.wait()
            raise BenchmarkError(f"died with code {code}{self._last_words()}", where=self.peer)
        try:
            return json.loads(line)
        except ValueError:
            raise BenchmarkError(f"answered {line[:200]!r}", where=self.peer) from None

    def ask(self, do: str, seconds: float = REPLY_SECONDS, **values: object) -> dict:
        """Ask for something and wait for the answer."""
        self.send(do, **values)
        return self.receive(seconds)

    def close(self) -> None:
        """End the process and all that it started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _read(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._replies.put(line)
        self._replies.put("")  # there will be no more

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return ":\n" + "\n".join(lines[-15:]) if lines else ""
