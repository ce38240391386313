"""A line that says what is running now."""

from __future__ import annotations

from workbench.live.outputs import HTML, TEXT, Slot, kernel_shell, literal


class StatusLine:
    """Called with a text, shows it in the place of the one before; outside of a notebook, nothing.

    Begin a new one in each cell: a line stays in the cell that it was first shown in.
    """

    def __init__(self):
        self._slot = Slot() if kernel_shell() is not None else None

    def __call__(self, text: str) -> None:
        if self._slot is not None:
            self._slot.show({HTML: literal(text), TEXT: text})
