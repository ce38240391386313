"""The chat's widgets; their callbacks may run on another thread, so they set flags only."""

from __future__ import annotations

import time

import ipywidgets

from workbench.live.controls import VIEW, acknowledge, button, close_widgets
from workbench.live.conversation import SIDES
from workbench.live.outputs import TEXT

SETTLE = 0.1  # seconds: the field's text may come after the key that sends it
PATIENCE = 1.0  # seconds that an empty field is waited for
HEIGHT = 560  # pixels of the conversation, at most
INSTEAD = "The chat was here. Without widgets: wb.chat(base, ['a question'])."
STYLE = (
    "<style>.workbench-chat .workbench-idle{opacity:.5}"
    ".workbench-chat .widget-html,.workbench-chat .widget-html-content{min-width:0}"
    ".workbench-chat button:focus-visible,.workbench-chat input:focus-visible"
    "{outline:2px solid var(--jp-brand-color1,#2f6fde);outline-offset:1px}</style>"
)


class ChatControls:
    """The conversation, a field for the question, buttons and settings.

    Args:
        adapter: "on", "off" or "both" to choose between them; None shows no choice.
        max_tokens, temperature: to begin with.
    """

    def __init__(self, adapter: str | None, max_tokens: int, temperature: float):
        self.stopping = self.ending = self.clearing = False
        self._asked_at: float | None = None
        self._done, self._current = ipywidgets.HTML(), ipywidgets.HTML()
        self._talk = ipywidgets.VBox([self._done, self._current], layout={"width": "100%"})
        # Reversed, a box that scrolls stays at its end while it grows.
        place = {"max_height": f"{HEIGHT}px", "overflow": "auto", "width": "100%"}
        place["flex_flow"] = "column-reverse nowrap"
        self._scroll = ipywidgets.VBox([self._talk], layout=place)
        self._field = ipywidgets.Text(
            placeholder="Ask something; Enter sends",
            continuous_update=False,
            layout={"flex": "1 1 320px", "width": "auto", "max_width": "760px"},
        )
        self._field.on_msg(self._hear)
        self._buttons = [
            button("Send", self._send, "Ask (Enter)"),
            button("Stop", self._stop, "Stop this answer"),
            button("Clear", self._clear, "Forget the conversation"),
            button("End", self._end, "End the chat; the conversation stays"),
        ]
        self._tokens = _number(ipywidgets.IntText, max_tokens, "max tokens", "170px")
        self._temperature = _number(ipywidgets.FloatText, temperature, "temperature", "170px")
        self._adapter = ipywidgets.ToggleButtons(
            options=[("with adapter", "on"), ("without", "off"), ("side by side", "both")],
            value=adapter or "on",
            style={"button_width": "auto"},
        )
        settings = [self._tokens, self._temperature, *([self._adapter] if adapter else [])]
        wrap = {"flex_flow": "row wrap", "align_items": "center"}
        self._asking = ipywidgets.HBox([self._field, *self._buttons], layout=wrap)
        self._settings = ipywidgets.HBox([*settings, ipywidgets.HTML(STYLE)], layout=wrap)
        for widget in (self._field, *settings):
            widget.observe(lambda _: acknowledge(), "value")
        self._box = ipywidgets.VBox([self._scroll, self._asking, self._settings])
        self._box.add_class("workbench-chat")

    @property
    def bundle(self) -> dict[str, object]:
        """What to display."""
        return {VIEW: self._box._repr_mimebundle_()[VIEW], TEXT: INSTEAD}

    @property
    def interrupted(self) -> bool:
        """Whether the answer that is being written shall end."""
        return self.stopping or self.ending or self.clearing

    @property
    def settings(self) -> dict[str, object]:
        """Of the next answer: max_tokens and temperature."""
        return {"max_tokens": self._tokens.value, "temperature": self._temperature.value}

    @property
    def sides(self) -> tuple[str, ...]:
        """That the next question goes to."""
        return SIDES[self._adapter.value]

    def take_question(self) -> str:
        """The question that was sent, once, and the field is emptied; "" while there is none."""
        waited = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        if waited < SETTLE:
            return ""
        question = self._field.value.strip()
        if question or waited > PATIENCE:
            self._asked_at = None
        if question:
            self._field.value = ""
        return question

    def show_done(self, content: str) -> None:
        """Show the turns that are over."""
        self._done.value = content

    def show_current(self, content: str) -> None:
        """Show the turn that is being answered."""
        self._current.value = content

    def show_busy(self, busy: bool) -> None:
        """The button that would change nothing is pale; none is disabled, which loses the focus."""
        for widget in self._buttons[:2]:
            pale = (widget.description == "Send") == busy
            (widget.add_class if pale else widget.remove_class)("workbench-idle")

    def retire(self) -> None:
        """Leave the conversation alone, for a tab that was reopened meanwhile."""
        self._box.children = [self._scroll]
        rows = (self._asking, self._settings)
        close_widgets(*rows, *self._asking.children, *self._settings.children, self._adapter)

    def close(self) -> None:
        """Close all that is left."""
        close_widgets(self._box, self._scroll, self._talk, self._done, self._current)

    def _hear(self, _: object, content: dict, __: object) -> None:
        if content.get("event") == "submit":
            self._send()

    def _send(self) -> None:
        self._asked_at = time.monotonic()

    def _stop(self) -> None:
        self.stopping = True

    def _clear(self) -> None:
        self.clearing = True

    def _end(self) -> None:
        self.ending = True


def _number(kind: type, value: float, name: str, width: str) -> ipywidgets.Widget:
    return kind(
        value, description=name, style={"description_width": "initial"}, layout={"width": width}
    )
