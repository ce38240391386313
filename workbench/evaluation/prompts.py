"""Prompts: questions, and chats as lists of messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence

from workbench.errors import DataError

Prompt = str | Sequence[Mapping[str, object]]  # a question, or chat messages


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt: a string, or the messages of one chat.

    Raises:
        DataError: it is neither that nor a list.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise DataError(
            f"prompts must be a text or a list, got {reprlib.repr(prompts)}",
            cure="A prompt is a text, or a chat as a list of messages.",
        )
    if not isinstance(prompts, Sequence):
        return False  # such as a generator, which can be read once, or a column of a frame
    return isinstance(prompts, str) or (
        bool(prompts) and all(isinstance(item, Mapping) for item in prompts)
    )


def messages_of(prompt: Prompt, where: str) -> list[Mapping[str, object]]:
    """A prompt as a chat's messages, which are not looked at.

    Raises:
        DataError: it is neither a text nor a list.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence):
        raise DataError(
            f"a prompt must be a text or a list of messages, got {reprlib.repr(prompt)}",
            where=where,
        )
    return list(prompt)
