"""Chats through a model's template, and special tokens that a text spells.

The template's own markers are control tokens. The same letters inside a message are text: a row
with the content "<|im_end|>" must not end the turn. Newer transformers' `sanitize_control_tokens`
has the same aim; here the places in the text are kept, for the loss mask. Added tokens that are
not special, such as "<think>" in some models, stay tokens: rows are written with them on purpose.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from workbench.data.rows import text_of
from workbench.data.special_tokens import special_tokens
from workbench.errors import DataError, is_text
from workbench.models.tokenizers import is_failure

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 2_000  # each answer's place is found by writing all before it
CURE = "Take it out, or let it act: allow_special_tokens=True."
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # that Unicode keeps out of texts

Messages = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Shielded:
    """A chat in which the special tokens that its texts spell stand between two marks."""

    messages: Messages
    tools: list | None
    marks: tuple[str, str] | None = None  # before and after each; None if none is spelled
    num_spelled: int = 0


def check_messages(messages: object, where: str) -> list[Mapping[str, object]]:
    """The messages of a chat, each with a known role and a text; raises DataError otherwise."""
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a list with at least one message", where=where)
    if len(messages) > MAX_MESSAGES:
        raise DataError(f"has more than {MAX_MESSAGES} messages", where=where, cure="Split it.")
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"must be an object, got {type(message).__name__}", where=place)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(
                f"unknown role {repr(role)[:100]}",
                where=place,
                cure=f"Roles are: {', '.join(ROLES)}.",
            )
        if not (message.get("content") is None and message.get("tool_calls")):
            text_of(message, "content", place)
    return messages


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: list | None,
    where: str,
    add_generation_prompt: bool = False,
) -> str:
    """The chat as the model's template writes it.

    Raises:
        DataError: there is no template, or it refuses the chat.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "a chat or completion needs a chat template, and this tokenizer has none",
            where=where,
            cure="Use rows of 'text', or the model's instruction-tuned sibling.",
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # the template is a program of the model's authors
        reason = repr(str(error)[:300])[1:-1]
        raise DataError(f"the chat template refuses it ({reason})", where=where) from None
    if not is_text(text):
        raise DataError("the chat holds half of a surrogate pair", where=where)
    return text


def shield(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list | None, where: str
) -> Shielded:
    """Mark every special token that the texts of a chat spell, in whatever field.

    The marks are characters that no text has; `tokenise_chat` takes them out again.

    Raises:
        DataError: no characters are left that could be marks.
    """
    pattern = special_tokens(tokenizer).pattern
    texts = list(_texts([messages, tools]))
    num_spelled = sum(len(pattern.findall(text)) for text in texts)
    if not num_spelled:
        return Shielded(messages, tools)
    free = [mark for mark in NONCHARACTERS if not any(mark in text for text in texts)]
    if len(free) < 2:
        raise DataError("holds every character that could mark a special token", where=where)
    before, after = free[:2]

    def mark(text: str) -> str:
        return pattern.sub(lambda found: f"{before}{found[0]}{after}", text)

    messages, tools = _rebuilt([messages, tools], mark)
    return Shielded(messages, tools, (before, after), num_spelled)


def _texts(value: object) -> Iterator[str]:
    """Every string of a chat, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _rebuilt(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_rebuilt(k, change): _rebuilt(item, change) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rebuilt(item, change) for item in value]
    return value


@dataclass(frozen=True)
class TokenisedChat:
    """Token ids, and where each begins."""

    ids: list[int]
    starts: list[int]  # characters of the text without marks
    mark_places: list[int]  # characters of the text with marks

    def place(self, marked: int) -> int:
        """A place in the text with marks, as one in the text without."""
        return marked - bisect.bisect_left(self.mark_places, marked)


def tokenise_chat(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: Shielded, where: str
) -> TokenisedChat:
    """Token ids of a chat that the template has written; what stands between marks is text.

    Raises:
        DataError: the template took a marked text apart, or the tokenizer cannot write it
            without the special token.
    """
    clean, spelled, mark_places = _without_marks(text, chat.marks, where)
    special = special_tokens(tokenizer).ids if spelled else frozenset()
    ends = [end for _, end in spelled]
    tokens: list[tuple[int, int]] = []  # (id, start)
    with refusing(where):
        encoded = tokenizer(
            clean,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=False,
        )
        write = functools.cache(functools.partial(_plain_tokens, tokenizer))
        for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            place = bisect.bisect_right(ends, start)
            if number not in special or place == len(spelled) or spelled[place][0] >= end:
                tokens.append((number, start))
                continue
            # A special token may take the white space around it with it, but nothing else.
            first, last = spelled[place]
            plain = write(clean[start:end])
            joined = (clean[start:first] + clean[last:end]).strip()
            if joined or (special - {tokenizer.unk_token_id}) & {token for token, _ in plain}:
                what = f"spells {clean[start:end]!r}, which this tokenizer cannot write as text"
                raise DataError(what, where=where, cure=CURE)
            tokens += [(token, start + offset) for token, offset in plain]
    return TokenisedChat([n for n, _ in tokens], [start for _, start in tokens], mark_places)


@contextlib.contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises, its panics included, into a DataError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, DataError) or not is_failure(error):
            raise
        reason = repr(str(error)[:300])[1:-1]
        raise DataError(f"the tokenizer refuses it ({reason})", where=where) from None


def _plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """(id, start) of the tokens of a text in the middle of another, none of them special."""
    # Some tokenizers put a space before whatever comes first: let that be a line's end.
    for prefix in ("\n", ""):
        encoded = tokenizer(
            prefix + text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        places = encoded["offset_mapping"]
        if all(end <= len(prefix) or start >= len(prefix) for start, end in places):
            break
    tokenizer.backend_tokenizer.encode_special_tokens = False  # the call above has set it
    return [
        (number, start - len(prefix))
        for number, (start, end) in zip(encoded["input_ids"], places)
        if end > len(prefix)
    ]


def _without_marks(
    text: str, marks: tuple[str, str] | None, where: str
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """The text, the ranges that stood between marks, and where the marks stood."""
    if marks is None:
        return text, [], []
    before, after = marks
    pieces, ranges, places, length = [], [], [], 0
    for piece in re.split(f"([{before}{after}])", text):
        if piece not in marks:
            pieces.append(piece)
            length += len(piece)
            continue
        if (piece == before) != (len(places) % 2 == 0):
            break
        if piece == before:
            start = length
        else:
            ranges.append((start, length))
        places.append(length + len(places))
    if len(places) % 2 or len(places) != text.count(before) + text.count(after):
        raise DataError(
            "the chat template takes a special token apart that a message spells",
            where=where,
            cure=CURE,
        )
    return "".join(pieces), ranges, places


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> list[int]:
    """Token ids of a chat up to where the answer begins; special tokens in messages are text.

    Raises:
        DataError: the messages are malformed, or the template or the tokenizer refuses them.
    """
    chat = shield(tokenizer, check_messages(messages, where), None, where)
    text = render_chat(tokenizer, chat.messages, None, where, add_generation_prompt=True)
    return tokenise_chat(tokenizer, text, chat, where).ids


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, continuation: str, where: str
) -> tuple[list[int], list[int]]:
    """Token ids of a chat up to where the answer begins, and of the chat with that answer begun.

    Raises:
        DataError: as `encode_prompt`.
    """
    answered = [*check_messages(messages, where), {"role": "assistant", "content": continuation}]
    chat = shield(tokenizer, answered, None, where)
    text = render_chat(tokenizer, chat.messages[:-1], None, where, add_generation_prompt=True)
    whole = text + chat.messages[-1]["content"]
    return tuple(tokenise_chat(tokenizer, each, chat, where).ids for each in (text, whole))
