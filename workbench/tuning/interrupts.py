"""Finish what has begun: an interrupt waits until the step and its report agree."""

from __future__ import annotations

import signal
import threading


class DeferredInterrupt:
    """Hold back Ctrl-C (SIGINT) inside a `with` block; it is raised when the block is done.

    Python handles signals on the main thread only; elsewhere the block runs unprotected.
    """

    def __init__(self):
        self.requested = False
        self._previous = None

    def __enter__(self) -> DeferredInterrupt:
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame) -> None:
        self.requested = True

    def __exit__(self, kind, error, traceback) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
        if self.requested and kind is None:
            raise KeyboardInterrupt
