"""Finish what has begun: an interrupt waits until the step and its report agree."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

WAITING = (signal.SIGINT, signal.SIGTERM)


class DeferredInterrupt:
    """Hold back Ctrl-C (SIGINT) and SIGTERM inside a `with` block.

    The first takes effect when the block is done: KeyboardInterrupt, or for SIGTERM what the
    process did with it before. A second one takes effect at once. A block within a block is part
    of it. Python handles signals on the main thread only; elsewhere the block runs unprotected.
    """

    def __init__(self):
        self._waiting: int | None = None  # the signal
        self._depth = 0  # of blocks
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal waits for the end of the block."""
        return self._waiting is not None

    def __enter__(self) -> DeferredInterrupt:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in WAITING}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._restore()
            self._waiting = None
            _raise(number)
        self._waiting = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, kind, error, traceback) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._restore()
        waiting, self._waiting = self._waiting, None
        if waiting is not None and kind is None:
            _raise(waiting)


@contextlib.contextmanager
def orderly_exit() -> Iterator[None]:
    """Have SIGTERM end the process by SystemExit, so that `finally` blocks run on the way out.

    Only where nobody has taken the signal for something else.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the shell's convention


def _raise(number: int) -> None:
    if number == signal.SIGINT:  # whose handler, under asyncio, only cancels later
        raise KeyboardInterrupt
    signal.raise_signal(number)
