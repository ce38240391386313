"""Talk with a model: a cell with widgets and streaming answers, or a plain function."""

from __future__ import annotations

import asyncio
import contextlib
import reprlib
import time
from collections.abc import Generator, Sequence

from workbench.errors import ConfigError, DataError, WorkbenchError, check_number, check_whole
from workbench.live.conversation import (
    Conversation,
    Transcript,
    Turn,
    sides_of,
    transcript_html,
)
from workbench.live.outputs import HTML, TEXT, Slot, has_reader, kernel_shell
from workbench.models.loading import BaseModel
from workbench.tuning.lora import has_adapter

PAUSE = 0.05  # seconds between two looks at the buttons while nothing is asked
TURNS = 5  # of the event loop, until a click that waits has been handled
REFRESH = 0.05  # seconds between two pictures of an answer that grows
NOBODY = "No reader: questions in advance make a chat of their own, wb.chat(base, ['a question'])."


def chat(
    base: BaseModel,
    questions: str | Sequence[str] | None = None,
    *,
    adapter: str = "on",
    system: str = "",
    max_tokens: int = 256,
    temperature: float = 0.0,
) -> Transcript | ChatCell:
    """Talk with a model: `await wb.chat(base)` in a notebook, wb.chat(base, ["…"]) anywhere.

    Args:
        base: a loaded model, with its adapter or without.
        questions: what to ask, one after the other; None makes a cell that asks the reader.
        adapter: "on", "off", or "both" for two answers side by side; the cell begins with it.
        system: a message that stands before all others.
        max_tokens: of an answer.
        temperature: 0 takes the likeliest token each time.

    Returns:
        With questions the `Transcript`; without them a cell to await, which gives one in the end.

    Raises:
        ConfigError: a setting is out of range, or no adapter to compare with.
        DataError: a question that the model cannot be asked; a cell shows it, and goes on.
    """
    check_whole("max_tokens", max_tokens, 1)
    check_number("temperature", temperature, 0)
    sides = sides_of(base, adapter)
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    conversation = Conversation(base, system)
    if questions is None:
        return ChatCell(conversation, adapter, settings)
    for question in _texts(questions):
        turn = Turn(question)
        for side in sides:
            for _ in conversation.answer(turn, side, **settings):
                pass
        conversation.turns.append(turn)
    return conversation.turns


def _texts(questions: object) -> list[str]:
    asked = [questions] if isinstance(questions, str) else questions
    if not isinstance(asked, Sequence) or not all(isinstance(text, str) for text in asked):
        raise DataError(f"questions must be texts, got {reprlib.repr(questions)}")
    return list(asked)


class ChatCell:
    """A chat in a notebook's cell, until somebody ends it; to be awaited.

    When it ends, by its button or the kernel's interrupt, the cell holds the conversation as plain
    HTML and no widget. Where nobody can type (papermill, nbconvert) it ends at once.

    Raises:
        ConfigError: when awaited: there is no notebook.
    """

    _retired = None  # the widgets of the chat before, see `ChatControls.retire`

    def __init__(self, conversation: Conversation, adapter: str, settings: dict[str, object]):
        self._talk, self._adapter, self._settings = conversation, adapter, settings

    def __await__(self) -> Generator[object, None, Transcript]:
        return self._run().__await__()

    def __repr__(self) -> str:
        return "a chat cell: await wb.chat(base) opens it"

    async def _run(self) -> Transcript:
        shell = kernel_shell()
        if shell is None:
            raise ConfigError(
                "a chat cell needs a notebook", cure="Give questions: wb.chat(base, ['…'])."
            )
        slot = Slot()
        if not has_reader(shell):
            slot.show({TEXT: NOBODY})
            return self._ended()
        from workbench.live.chat_controls import ChatControls  # widgets where they can be shown

        if ChatCell._retired is not None:
            ChatCell._retired.close()
        choice = self._adapter if has_adapter(self._talk.base.model) else None
        controls = ChatControls(choice, **self._settings)
        ChatCell._retired = controls
        controls.show_busy(False)
        controls.show_done(transcript_html(self._talk.turns))
        slot.show(controls.bundle)
        try:
            await self._serve(controls)
        except (asyncio.CancelledError, KeyboardInterrupt):
            asyncio.current_task().uncancel()
        finally:
            self._close(controls, slot)
        return self._ended()

    def _ended(self) -> Transcript:
        self._talk.turns.shown = True
        return self._talk.turns

    def _close(self, controls: object, slot: Slot) -> None:
        turns = self._talk.turns
        controls.show_current("")
        controls.show_done(transcript_html(turns))
        slot.show({HTML: transcript_html(turns), TEXT: str(turns) or "nothing was asked"})
        controls.retire()

    async def _serve(self, controls: object) -> None:
        while not controls.ending:
            if controls.clearing:
                self._talk.turns.clear()
                controls.clearing = False
                controls.show_done("")
            question = controls.take_question()
            if question:
                await self._answer(controls, question)
            await asyncio.sleep(PAUSE)

    async def _answer(self, controls: object, question: str) -> None:
        """Ask all sides one after the other, and show the answers as they grow."""
        controls.stopping, turn, whole = False, Turn(question), False
        sides, settings = controls.sides, controls.settings
        controls.show_busy(True)
        try:
            for side in sides:
                controls.show_current(transcript_html([turn], sides, live=True))
                if not controls.interrupted:
                    await self._answer_side(controls, turn, side, sides, settings)
            whole = not controls.interrupted
        finally:
            turn.stopped = not whole
            self._talk.turns.append(turn)
            controls.show_done(transcript_html(self._talk.turns))
            controls.show_current("")
            controls.show_busy(False)

    async def _answer_side(
        self, controls: object, turn: Turn, side: str, sides: Sequence[str], settings: dict
    ) -> None:
        shown = 0.0
        try:
            with contextlib.closing(self._talk.answer(turn, side, **settings)) as pieces:
                for _ in pieces:
                    if time.monotonic() > shown + REFRESH:
                        controls.show_current(transcript_html([turn], sides, live=True))
                        shown = time.monotonic()
                    for _ in range(TURNS):
                        await asyncio.sleep(0)
                    if controls.interrupted:
                        return
        except WorkbenchError as error:
            turn.errors[side] = str(error)
