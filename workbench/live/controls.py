"""The panel's widgets; their callbacks may run on another thread, so they set flags only."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets
from traitlets import HasTraits

from workbench.live.outputs import TEXT, kernel_shell

VIEW = "application/vnd.jupyter.widget-view+json"
PICTURE_WIDTH = 1166  # pixels, at most
CLOSED = "The panel was here. wb.show_run(folder) draws a run from its folder."
STYLE = (
    "<style>.workbench-controls .workbench-idle{opacity:.5}"
    ".workbench-controls button:focus-visible,.workbench-controls input:focus-visible"
    "{outline:2px solid var(--jp-brand-color1,#2f6fde);outline-offset:1px}</style>"
)


class Controls:
    """Numbers, buttons, picture and samples as widgets of a notebook.

    Args:
        actions: name of a button → what it asks for, and its tooltip.
        set_rate: takes the learning rate that was typed.
        rate: the learning rate to begin with.
    """

    def __init__(
        self,
        actions: dict[str, tuple[Callable[[], None], str]],
        set_rate: Callable[[float], None],
        rate: float,
    ):
        self._heading, self._samples = ipywidgets.HTML(), ipywidgets.HTML()
        self._picture = ipywidgets.Image(
            format="png", layout={"width": "100%", "max_width": f"{PICTURE_WIDTH}px", "margin": "0"}
        )
        self._buttons = [button(name, *action) for name, action in actions.items()]
        self._rate = ipywidgets.FloatText(
            rate,
            description="peak learning rate",
            style={"description_width": "initial"},
            layout={"width": "240px", "margin": "2px 2px 2px 14px"},
        )
        self._rate.observe(lambda change: (set_rate(change["new"]), acknowledge()), "value")
        row = ipywidgets.HBox(
            [*self._buttons, self._rate, ipywidgets.HTML(STYLE)], layout={"flex_flow": "row wrap"}
        )
        row.add_class("workbench-controls")
        self._row, self._box = row, ipywidgets.VBox([self._heading, row])
        self._asking, self._answer = ipywidgets.IntText(1), ipywidgets.IntText(0)
        # The link is drawn by the browser: the answer turns 1 only where widgets are alive.
        self._link = ipywidgets.jsdlink((self._asking, "value"), (self._answer, "value"))

    @property
    def alive(self) -> bool:
        """Whether a browser has shown that it runs widgets."""
        return self._answer.value == 1

    def bundles(self) -> list[dict[str, object]]:
        """What to display: numbers with the buttons, picture, samples."""
        parts = (self._box, self._picture, self._samples)
        return [{VIEW: part._repr_mimebundle_()[VIEW], TEXT: CLOSED} for part in parts]

    def show_numbers(self, heading: str, rate: float | None, paused: bool) -> None:
        """Show status and tiles; a rate other than None goes into the field.

        The button that would change nothing is pale. It stays enabled: a browser takes the
        keyboard's focus away from what is disabled.
        """
        self._heading.value = heading
        for widget in self._buttons:
            pale = widget.description == ("Pause" if paused else "Resume")
            (widget.add_class if pale else widget.remove_class)("workbench-idle")
        if rate is not None:
            self._rate.value = rate

    def show_picture(self, png: bytes) -> None:
        """Show another picture."""
        self._picture.value = png

    def show_samples(self, table: str) -> None:
        """Show another table."""
        self._samples.value = table

    def retire(self) -> None:
        """Take the buttons away, and leave what is shown.

        A tab that was reopened while training no longer hears about display ids: there, these
        widgets go on showing the final state until they are closed.
        """
        self._box.children = [self._heading]
        close_widgets(self._row, *self._row.children, self._link, self._asking, self._answer)

    def close(self) -> None:
        """Close all that is left."""
        close_widgets(self._box, self._heading, self._picture, self._samples)


def close_widgets(*widgets: ipywidgets.Widget) -> None:
    """Close widgets with the layout and style that belong to them."""
    for widget in widgets:
        own: list[HasTraits] = [widget, getattr(widget, "layout", None)]
        own.append(getattr(widget, "style", None))
        for part in own:
            if part is not None:
                part.close()


def acknowledge() -> None:
    """Tell the browser that its message has been handled.

    A widget in the browser sends its next value only when the kernel was idle after the last one,
    and ipykernel 7 (7.4.0 was read) does not say so of messages that it handles inside a cell.
    """
    shell = kernel_shell()
    if shell is not None and shell.get_parent().get("header", {}).get("msg_type") == "comm_msg":
        shell.kernel.send_response(shell.kernel.iopub_socket, "status", {"execution_state": "idle"})


def button(name: str, action: Callable[[], None], tooltip: str) -> ipywidgets.Button:
    """A button as wide as its name that calls `action`, which may set flags only."""
    widget = ipywidgets.Button(description=name, tooltip=tooltip, layout={"width": "auto"})
    widget.on_click(lambda _: action())
    return widget
