"""Where a picture goes: the outputs of a notebook's cell, updated in place."""

from __future__ import annotations

import html
import uuid
from collections.abc import Mapping

PNG, HTML, TEXT = "image/png", "text/html", "text/plain"
CUT = 400  # characters of a text that are shown
TITLE_CUT = 2000  # characters that a text's tooltip holds
BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # would turn the line's direction


def kernel_shell() -> object | None:
    """The shell of the notebook kernel that this process is; None in a terminal or a program."""
    from IPython import get_ipython

    shell = get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


def has_reader(shell: object) -> bool:
    """Whether the cell was started by a program that could ask a person something.

    Jupyter's protocol says so in each request (`allow_stdin`): JupyterLab and its like could;
    papermill, nbval and nbconvert could not.
    """
    request = shell.get_parent()
    return bool(request.get("content", {}).get("allow_stdin"))


class Slot:
    """One output of the cell that runs now: shown once, then updated in place."""

    def __init__(self):
        self._id = uuid.uuid4().hex
        self.shown = False

    def show(self, data: Mapping[str, object], metadata: Mapping | None = None) -> None:
        """Show a bundle of MIME type → content in the place of the one before."""
        from IPython.display import display, update_display

        style = {"metadata": dict(metadata or {}), "raw": True, "display_id": self._id}
        if self.shown:
            update_display(dict(data), **style)
        else:
            display(dict(data), **style)
            self.shown = True

    def show_picture(self, png: bytes, size: tuple[int, int], text: str) -> None:
        """Show a picture; its place is kept while it loads, and narrow windows shrink it.

        Args:
            png: the file's bytes.
            size: width and height in pixels.
            text: what to read where no picture can be shown.
        """
        place = {"width": size[0], "height": size[1], "alt": text}
        self.show({PNG: png, TEXT: text}, {PNG: place})


def literal(text: str, cut: int = CUT) -> str:
    """Any text as HTML that shows it as it is: no tags, no formulas, no control characters.

    A dollar sign or a backslash in an element of its own begins no formula: MathJax looks for
    one within a piece of text. What is longer than `cut` characters is cut; the tooltip holds more.
    """
    shown, tip = visible(text), ""
    if len(shown) > cut:
        more = shown[:TITLE_CUT] + ("…" if len(shown) > TITLE_CUT else "")
        shown, tip = shown[:cut] + "…", f' title="{html.escape(more)}"'
    safe = html.escape(shown).replace("$", "<span>$</span>").replace("\\", "<span>\\</span>")
    return f'<span style="white-space:pre-wrap;overflow-wrap:break-word"{tip}>{safe}</span>'


def visible(text: str) -> str:
    """The text with control characters, such as a terminal's, written out: \\x1b."""
    return "".join(map(_sign, text))


def _sign(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or not (
        code < 32 or 127 <= code < 160 or code in BIDI or 0xD800 <= code < 0xE000
    ):
        return character
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
