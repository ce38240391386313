"""A conversation with a model, with its adapter and without it, and how it reads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from workbench.errors import ConfigError
from workbench.evaluation.decoding import KeptPrompt
from workbench.evaluation.generation import stream
from workbench.live.outputs import HTML, TEXT, literal, visible
from workbench.live.tiles import ALARM, FONT, GROUND, WIDTH
from workbench.models.loading import BaseModel
from workbench.tuning.lora import adapter_disabled, has_adapter

ON, OFF = "with adapter", "without adapter"
SIDES = {"on": (ON,), "off": (OFF,), "both": (ON, OFF)}
COLUMN = 300  # pixels that an answer needs to stand beside another
CURSOR = "▍"  # the answer goes on here


@dataclass
class Turn:
    """One question and what came of it."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)  # side → text, as far as it got
    errors: dict[str, str] = field(default_factory=dict)  # side → why there is no answer
    stopped: bool = False  # before the answers were whole


class Transcript(list[Turn]):
    """The turns of a conversation; shows itself as the last value of a cell."""

    shown = False  # whether the cell shows it already

    def messages(self, side: str = ON) -> list[dict[str, str]]:
        """What was said to one side and by it, as chat messages; failed questions are left out."""
        return [
            {"role": role, "content": content}
            for turn in self
            if side in turn.answers
            for role, content in (("user", turn.question), ("assistant", turn.answers[side]))
        ]

    def __str__(self) -> str:
        lines = []
        for turn in self:
            said = {**turn.answers, **{s: f"error: {e}" for s, e in turn.errors.items()}}
            lines.append(f"you: {turn.question}")
            lines += [f"{side}: {text}" for side, text in said.items()]
        return visible("\n".join(lines))

    __repr__ = __str__

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if not self.shown:
            display({HTML: transcript_html(self), TEXT: str(self)}, raw=True)


class Conversation:
    """Asks a model question after question; each side remembers what it was asked itself.

    Args:
        base: a loaded model.
        system: a message that stands before all others; "" for none.
    """

    def __init__(self, base: BaseModel, system: str = ""):
        self.base, self.turns = base, Transcript()
        self._system = [{"role": "system", "content": system}] if system else []
        self._kept = {ON: KeptPrompt(), OFF: KeptPrompt()}  # so that no turn is computed twice

    def answer(self, turn: Turn, side: str, **settings: object) -> Iterator[None]:
        """Answer a turn's question on one side, a piece with each step of the iterator.

        Closing the iterator early keeps what there is.

        Raises:
            WorkbenchError: the question cannot be asked, or a setting is out of range.
        """
        question = {"role": "user", "content": turn.question}
        messages = [*self._system, *self.turns.messages(side), question]
        settings = {"seed": len(self.turns), **settings}
        off = adapter_disabled(self.base.model) if side == OFF else contextlib.nullcontext()
        with off, contextlib.closing(self._pieces(messages, side, settings)) as pieces:
            for piece in pieces:
                turn.answers[side] = turn.answers.get(side, "") + piece
                yield

    def _pieces(
        self, messages: Sequence[dict[str, str]], side: str, settings: dict[str, object]
    ) -> Iterator[str]:
        return stream(self.base, messages, kept=self._kept[side], **settings)


def sides_of(base: BaseModel, adapter: str) -> tuple[str, ...]:
    """The sides that answer.

    Args:
        base: a loaded model.
        adapter: "on", "off" or "both".

    Raises:
        ConfigError: another word, or a model without an adapter.
    """
    if adapter not in SIDES:
        raise ConfigError(f"adapter must be one of {[*SIDES]}, got {adapter!r}")
    if adapter != "on" and not has_adapter(base.model):
        raise ConfigError(
            f"adapter {adapter!r}: no adapter is attached",
            cure="Attach one: wb.add_lora or wb.load_adapter.",
        )
    return SIDES[adapter]


def transcript_html(turns: Sequence[Turn], sides: Sequence[str] = (), live: bool = False) -> str:
    """Turns as HTML; all text is escaped.

    Args:
        turns: in their order.
        sides: that will answer, with a column each before they begin.
        live: whether the last answer is still being written.
    """
    parts = "".join(_turn_html(turn, sides, live) for turn in turns)
    return (
        f'<div role="log" style="{FONT};font-size:14px;line-height:1.5;max-width:{WIDTH}px">'
        f"{parts}</div>"
    )


def _turn_html(turn: Turn, sides: Sequence[str], live: bool) -> str:
    there = list(dict.fromkeys([*turn.answers, *turn.errors, *sides]))
    begun = [side for side in there if side in turn.answers] or there
    writing = begun[-1 if turn.answers else 0] if live else None
    named = there != [ON]
    cells = "".join(_cell_html(turn, side, named, side == writing) for side in there)
    stopped = '<div style="font-size:12px;opacity:.8">stopped</div>' if turn.stopped else ""
    return (
        '<div style="margin:8px 0 14px">'
        f'<div style="font-weight:600;margin:0 0 4px">{_whole(turn.question)}</div>'
        '<div style="display:grid;gap:8px;'
        f'grid-template-columns:repeat(auto-fit,minmax(min(100%,{COLUMN}px),1fr))">{cells}</div>'
        f"{stopped}</div>"
    )


def _cell_html(turn: Turn, side: str, named: bool, writing: bool) -> str:
    name = f'<div style="font-size:12px;opacity:.8">{literal(side)}</div>' if named else ""
    text = _whole(turn.answers.get(side, "") + (CURSOR if writing else ""))
    if side in turn.errors:
        error = f'<strong style="color:{ALARM}">no answer</strong> {_whole(turn.errors[side])}'
        text = f"<div>{text}</div>{error}" if turn.answers.get(side) else error
    return (
        f'<div style="{GROUND};border-radius:4px;padding:6px 10px;min-width:0;min-height:21px">'
        f"{name}{text}</div>"
    )


def _whole(text: str) -> str:
    return literal(text, cut=sys.maxsize)
