"""Runs each case in a process of its own: imports once, then forks for every request.

Reads a JSON list [module, action, argument] a line; answers with a JSON object a line. The fork
happens before MLX has computed anything, so that a child begins as a fresh process would.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import time

import workbench  # noqa: F401 - the BLAS first
from workbench.errors import WorkbenchError

SECONDS = 60  # before a case counts as hung
LARGEST_ANSWER = 1 << 24  # bytes


def act(module: str, action: str, argument: object) -> dict[str, object]:
    """What the action gave or raised."""
    try:
        value = getattr(importlib.import_module(module), action)(argument)
        return {"kind": "result", "value": value}
    except WorkbenchError as error:
        return {"kind": "typed error", "type": type(error).__name__, "text": str(error)}
    except BaseException as error:
        return {"kind": "untyped error", "type": type(error).__name__, "text": str(error)[:2000]}


def run_in_child(request: list) -> dict[str, object]:
    """Fork, act in the child, and say how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        content = json.dumps(act(*request)).encode()
        for start in range(0, len(content), 1 << 16):
            os.write(writer, content[start : start + (1 << 16)])
        os._exit(0)
    os.close(writer)
    content, end = b"", time.monotonic() + SECONDS
    while len(content) < LARGEST_ANSWER:
        ready, _, _ = select.select([reader], [], [], max(0, end - time.monotonic()))
        piece = os.read(reader, 1 << 16) if ready else b""
        if not piece:
            break
        content += piece
    hung = not ready
    if hung:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if hung:
        return {"kind": "death", "type": f"no end within {SECONDS} s", "text": ""}
    if os.WIFSIGNALED(status):
        return {"kind": "death", "type": signal.Signals(os.WTERMSIG(status)).name, "text": ""}
    if not content:
        return {"kind": "death", "type": f"exit status {os.WEXITSTATUS(status)}", "text": ""}
    return json.loads(content)


def main() -> None:
    """Serve until standard input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(run_in_child(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
