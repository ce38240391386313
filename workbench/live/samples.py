"""Answers of the model while it trains."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.errors import RunError, check_whole
from workbench.evaluation.generation import encode_prompt, generate
from workbench.evaluation.prompts import Prompt, is_single
from workbench.live.outputs import literal
from workbench.live.tiles import FONT, TRACK, WIDTH
from workbench.models.loading import BaseModel
from workbench.runs.store import read_rows

SAMPLES_NAME = "samples.jsonl"
SHOWN = 6  # answers to a prompt: the first, and the newest


@dataclass(frozen=True)
class Sample:
    """What the model answered at one moment of its training."""

    step: int  # optimizer updates made by then
    prompt: str
    answer: str


class Sampler:
    """Asks a model the same questions again and again.

    Args:
        base: the model that trains.
        prompts: one question, or several; a chat's messages count as one.
        max_new_tokens: of an answer.

    Raises:
        DataError: a prompt is empty, or longer than the model has positions.
        ConfigError: max_new_tokens is not a whole number from 1.
    """

    def __init__(self, base: BaseModel, prompts: Prompt | Sequence[Prompt], max_new_tokens: int):
        check_whole("max_new_tokens", max_new_tokens, 1)
        self._prompts = [prompts] if is_single(prompts) else list(prompts)
        self._base, self._max_tokens = base, max_new_tokens
        for prompt in self._prompts:
            encode_prompt(base, prompt)  # a bad one is refused before training begins

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def ask(self, step: int) -> list[Sample]:
        """Greedy answers to all prompts, after so many steps."""
        answers = generate(self._base, self._prompts, max_tokens=self._max_tokens)
        asked = [_question(prompt) for prompt in self._prompts]
        return [Sample(step, *pair) for pair in zip(asked, answers)]


def _question(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def as_rows(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """Samples as the rows of a run's file."""
    return [dataclasses.asdict(sample) for sample in samples]


def read_samples(folder: str | os.PathLike) -> list[Sample]:
    """The samples of a run; none if it has no such file.

    Raises:
        RunError: the file is damaged, or holds something else.
    """
    path = os.path.join(folder, SAMPLES_NAME)
    if not os.path.exists(path):
        return []
    rows = read_rows(folder, SAMPLES_NAME)
    names = [field.name for field in dataclasses.fields(Sample)]
    for number, row in enumerate(rows, 1):
        if not all(name in row for name in names):
            raise RunError(f"lacks one of {', '.join(names)}", where=f"{path}:{number}")
    return [Sample(*(row[name] for name in names)) for row in rows]


def samples_html(samples: Sequence[Sample]) -> str:
    """The answers as a table, prompt by prompt in the order of steps; all text is escaped."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(str(sample.prompt), []).append(sample)
    rows = "".join(_rows(prompt, asked) for prompt, asked in by_prompt.items())
    head = "".join(_cell(name, "th") for name in ("prompt", "step", "answer"))
    return (
        f'<table style="{FONT};font-size:13px;line-height:1.4;width:100%;max-width:{WIDTH}px;'
        f'margin:4px 0;border-collapse:collapse;table-layout:fixed">'
        '<colgroup><col style="width:32%"><col style="width:64px"><col></colgroup>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _rows(prompt: str, asked: Sequence[Sample]) -> str:
    shown = [*asked[:1], *asked[1:][1 - SHOWN :]]
    rows = []
    for place, sample in enumerate(shown):
        first = _cell(literal(prompt), rows=len(shown)) if place == 0 else ""
        step = _cell(f"{sample.step}", align="right")
        rows.append(f"<tr>{first}{step}{_cell(literal(str(sample.answer)))}</tr>")
    return "".join(rows)


def _cell(content: str, tag: str = "td", rows: int = 1, align: str = "left") -> str:
    span = f' rowspan="{rows}"' if rows > 1 else ""
    place = f"text-align:{align};vertical-align:top;padding:4px 10px"
    wrap = "overflow-wrap:break-word;white-space:normal"
    style = f"{place};border-top:1px solid {TRACK};{wrap}"
    return f'<{tag}{span} style="{style}">{content}</{tag}>'
