"""A row of text becomes tokens and a loss mask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from workbench.errors import ConfigError, DataError, check_whole

ROLES = ("system", "developer", "user", "assistant", "tool")
TRAIN_ON = ("assistant", "last", "all")


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised row.

    `loss_mask[t]` says whether token t is a target: whether the model, having read the tokens
    before t, is trained to produce it. The first token can never be one.
    """

    tokens: np.ndarray  # (T,) int32
    loss_mask: np.ndarray  # (T,) bool
    where: str  # file and line, for messages
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Number of supervised targets."""
        return int(self.loss_mask[1:].sum())


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (place, row) for each line of a JSONL file; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, is empty, or a line is not a JSON object in UTF-8;
            names the line.
    """
    path, found = Path(path), False
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found = True
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None
    if not found:
        raise DataError("holds no rows", where=path, cure="Write one JSON object a line.")


def _parse(line: bytes, where: str) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 (byte {error.start} of the line)",
            where=where,
            cure="Save the file as UTF-8.",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not valid JSON ({error})", where=where) from None
    if not isinstance(row, dict):
        raise DataError(f"must be a JSON object, got {type(row).__name__}", where=where)
    return row


def encode_row(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    train_on: str = "assistant",
    where: str = "row",
) -> Example:
    """Tokenise a row in one of mlx-lm's formats, and mark its targets.

    Args:
        row: `messages` (with optional `tools`), `prompt` and `completion`, or `text`.
        tokenizer: with a chat template, for chats and completions.
        max_length: tokens that are kept, from the start.
        train_on: targets of a chat: all `assistant` turns (each with the token that ends it), the
            `last` turn, or `all` tokens. All of a `text` is trained.
        where: the row's place, for messages.

    Raises:
        DataError: the row has no known format, wrong types, an unknown role, or no target.
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"train_on {train_on!r} is unknown", cure=f"Use one of {TRAIN_ON}.")
    check_whole("max_length", max_length, 2)
    if "messages" in row or "prompt" in row or "completion" in row:
        text, spans = _chat_text(row, tokenizer, train_on, where)
        tokens, loss_mask = _encode_spans(text, spans, tokenizer)
    elif "text" in row:
        tokens = _encode_text(_string(row, "text", where), tokenizer)
        loss_mask = np.ones(len(tokens), dtype=bool)
    else:
        raise DataError(
            f"has none of the known keys (it has {', '.join(map(repr, row)) or 'none at all'})",
            where=where,
            cure="Use 'messages', 'prompt' and 'completion', or 'text'.",
        )
    return _cut(tokens, loss_mask, max_length, where)


def _cut(tokens: np.ndarray, loss_mask: np.ndarray, max_length: int, where: str) -> Example:
    """The example up to its last target within max_length; raises DataError if it has none."""
    truncated = bool(loss_mask[max_length:].any())  # white space of the template is no loss
    targets = np.flatnonzero(loss_mask[:max_length])
    # What follows the last target trains nothing, and under a causal mask changes nothing.
    end = targets[-1] + 1 if len(targets) else 0
    example = Example(tokens[:end], loss_mask[:end], where, truncated)
    if not example.num_targets:
        reason = f"within max_length={max_length} tokens" if truncated else "to train on"
        raise DataError(
            f"has no supervised token {reason}",
            where=where,
            cure="Raise max_length." if truncated else "Give it an assistant turn or some text.",
        )
    return example


def _string(row: Mapping[str, object], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, got {type(value).__name__}", where=where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{key!r} holds half of a surrogate pair", where=where) from None
    return value


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    ids = list(tokenizer.encode(text))
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return np.array(ids, dtype=np.int32)


def _chat_text(
    row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, train_on: str, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The chat as one string, and the character ranges that are trained."""
    messages = check_messages(row["messages"], where) if "messages" in row else _pair(row, where)
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError("'tools' must be a list", where=where)
    text = render_chat(tokenizer, messages, tools, where)
    if train_on == "all":
        return text, [(0, len(text))]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = [i for i in turns if i == len(messages) - 1]
    if turns[:1] == [0]:
        raise DataError(
            "begins with an assistant turn, which answers nothing",
            where=where,
            cure="Begin with a user or system message, or use train_on='last' or 'all'.",
        )
    spans = []
    for turn in turns:
        before = render_chat(tokenizer, messages[:turn], tools, where, add_generation_prompt=True)
        after = render_chat(tokenizer, messages[: turn + 1], tools, where)
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            raise DataError(
                f"the chat template rewrites turn {turn}, so its targets cannot be told",
                where=where,
                cure="Use train_on='last' or 'all' with this model.",
            )
        # What follows the end-of-turn token is the template's own white space.
        spans.append((len(before), len(after.rstrip())))
    return text, spans


def _pair(row: Mapping[str, object], where: str) -> list[dict[str, object]]:
    return [
        {"role": "user", "content": _string(row, "prompt", where)},
        {"role": "assistant", "content": _string(row, "completion", where)},
    ]


def check_messages(messages: object, where: str) -> list[Mapping[str, object]]:
    """The messages of a chat, each with a known role and a text; raises DataError otherwise."""
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a list with at least one message", where=where)
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"must be an object, got {type(message).__name__}", where=place)
        if message.get("role") not in ROLES:
            raise DataError(
                f"unknown role {message.get('role')!r}",
                where=place,
                cure=f"Roles are: {', '.join(ROLES)}.",
            )
        if not (message.get("content") is None and message.get("tool_calls")):
            _string(message, "content", place)
    return messages


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
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
        return tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"the chat template refuses it ({error})", where=where) from None


def _encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the text, and which of them begin inside one of the character ranges."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    loss_mask = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        loss_mask |= (starts >= first) & (starts < last)
    return np.array(encoded["input_ids"], dtype=np.int32), loss_mask
