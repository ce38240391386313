"""How a peer talks to its conductor: JSON lines on the pipes that were stdin and stdout.

Standard library only, and imported first: what other libraries write to stdout goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

PEAK_FROM = {True: "VmHWM since the first step", False: "ru_maxrss since the start"}

_replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
_messages: queue.SimpleQueue[dict] = queue.SimpleQueue()
_since_first_step = False


def _listen() -> None:
    for line in sys.stdin:
        _messages.put(json.loads(line))
    os._exit(0)  # the conductor is gone: not even the step that is being made is of use


threading.Thread(target=_listen, daemon=True).start()


def receive() -> dict:
    """The conductor's next message; when the conductor is gone, this process ends by itself."""
    return _messages.get()


def reply(content: Mapping[str, object]) -> None:
    """Answer the message that was received last."""
    _replies.write(json.dumps(content) + "\n")
    _replies.flush()


def answer(message: dict, peer: object) -> None:
    """Have the peer's method of that name do what a message asks for, and reply."""
    reply(getattr(peer, message.pop("do"))(**message))


def serve(peer: object) -> None:
    """Answer messages until the conductor is gone."""
    while True:
        answer(receive(), peer)


def read_job(path: str) -> dict:
    """The work, as the conductor wrote it."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forget_process_peak() -> None:
    """Let the process's peak begin anew, where the system can (Linux)."""
    global _since_first_step
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        _since_first_step = True


def process_peak() -> dict:
    """Largest resident set in bytes, and what it counts from."""
    return {"process_peak_bytes": _largest_resident(), "peak_from": PEAK_FROM[_since_first_step]}


def _largest_resident() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
