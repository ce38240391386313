"""A row of text becomes tokens and a loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.data.chats import (
    Shielded,
    check_messages,
    refusing,
    render_chat,
    shield,
    tokenise_chat,
)
from workbench.data.rows import provenance_of, text_of
from workbench.data.rows import read_rows as read_rows
from workbench.errors import ConfigError, DataError, check_whole

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
    num_spelled: int = 0  # special tokens that the messages spell, encoded as text
    authority_weight: float | None = None  # 0 to 0.99; None: the row does not say
    provenance_entropy: float | None = None  # bits, from 0; None: the row does not say

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sides(self) -> tuple[Example]:
        """What goes through the network for this row; a preference pair has two."""
        return (self,)

    @property
    def num_targets(self) -> int:
        """Number of supervised targets."""
        return int(self.loss_mask[1:].sum())


def all_sides(rows: Iterable[Example]) -> list[Example]:
    """What goes through the network for these rows: each by itself, of a pair both sides."""
    return [side for row in rows for side in row.sides]


def encode_row(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    train_on: str = "assistant",
    allow_special_tokens: bool = False,
    where: str = "row",
) -> Example:
    """Tokenise a row in one of mlx-lm's formats, and mark its targets.

    Args:
        row: `messages` (with optional `tools`), `prompt` and `completion`, or `text`; beside them
            `authority_weight` and `provenance_entropy`, which the example carries.
        tokenizer: with a chat template, for chats and completions.
        max_length: tokens that are kept, from the start.
        train_on: targets of a chat: all `assistant` turns (each with the token that ends it), the
            `last` turn, or `all` tokens. All of a `text` is trained.
        allow_special_tokens: let special tokens that a message spells, such as "<|im_end|>", act
            as control tokens. Otherwise they are text, and only the template's own act. In a
            `text`, which no template writes, they always act.
        where: the row's place, for messages.

    Raises:
        DataError: the row has no known format, wrong types, an unknown role, no target, or
            provenance out of range.
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"train_on {train_on!r} is unknown", cure=f"Use one of {TRAIN_ON}.")
    check_whole("max_length", max_length, 2)
    encoded = _encode(row, tokenizer, train_on, allow_special_tokens, where)
    return replace(_cut(*encoded, max_length, where), **provenance_of(row, where))


def _encode(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    train_on: str,
    allow_special_tokens: bool,
    where: str,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens, which of them are trained, and how many special tokens the row's chat spells."""
    if "messages" in row or "prompt" in row or "completion" in row:
        return _encode_chat(row, tokenizer, train_on, allow_special_tokens, where)
    if "text" in row:
        tokens = _encode_text(text_of(row, "text", where), tokenizer, where)
        return tokens, np.ones(len(tokens), dtype=bool), 0
    raise DataError(
        f"has none of the known keys (it has {_named(row)})",
        where=where,
        cure="Use 'messages', 'prompt' and 'completion', or 'text'.",
    )


def _named(row: Mapping[str, object]) -> str:
    return ", ".join(repr(key[:50]) for key in list(row)[:10]) or "none at all"


def _cut(
    tokens: np.ndarray, loss_mask: np.ndarray, num_spelled: int, max_length: int, where: str
) -> Example:
    """The example up to its last target within max_length; raises DataError if it has none."""
    truncated = bool(loss_mask[max_length:].any())  # white space of the template is no loss
    targets = np.flatnonzero(loss_mask[:max_length])
    # What follows the last target trains nothing, and under a causal mask changes nothing.
    end = targets[-1] + 1 if len(targets) else 0
    example = Example(tokens[:end], loss_mask[:end], where, truncated, num_spelled)
    if not example.num_targets:
        reason = f"within max_length={max_length} tokens" if truncated else "to train on"
        raise DataError(
            f"has no supervised token {reason}",
            where=where,
            cure="Raise max_length." if truncated else "Give it an assistant turn or some text.",
        )
    return example


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> np.ndarray:
    with refusing(where):
        ids = list(tokenizer.encode(text, split_special_tokens=False))
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return np.array(ids, dtype=np.int32)


def _encode_chat(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    train_on: str,
    allow_special_tokens: bool,
    where: str,
) -> tuple[np.ndarray, np.ndarray, int]:
    """What `_encode` gives, of a chat."""
    messages = check_messages(row["messages"], where) if "messages" in row else _pair(row, where)
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError("'tools' must be a list", where=where)
    chat = Shielded(messages, tools)
    if not allow_special_tokens:
        chat = shield(tokenizer, messages, tools, where)
    text = render_chat(tokenizer, chat.messages, chat.tools, where)
    tokenised = tokenise_chat(tokenizer, text, chat, where)
    starts = np.array(tokenised.starts, dtype=np.int64)
    loss_mask = np.zeros(len(starts), dtype=bool)
    for first, last in _trained_spans(text, chat, tokenizer, train_on, where):
        loss_mask |= (starts >= tokenised.place(first)) & (starts < tokenised.place(last))
    return np.array(tokenised.ids, dtype=np.int32), loss_mask, chat.num_spelled


def _trained_spans(
    text: str, chat: Shielded, tokenizer: PreTrainedTokenizerBase, train_on: str, where: str
) -> list[tuple[int, int]]:
    """The character ranges of the chat, as the template wrote it, that are trained."""
    messages = chat.messages
    if train_on == "all":
        return [(0, len(text))]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = [i for i in turns if i == len(messages) - 1]
    if turns[:1] == [0]:
        raise DataError(
            "begins with an assistant turn, which answers nothing",
            where=where,
            cure="Begin with a user or system message, or use train_on='last' or 'all'.",
        )

    def render(count: int, **options: bool) -> str:
        return render_chat(tokenizer, messages[:count], chat.tools, where, **options)

    spans, others = [], "'all'" if train_on == "last" else "'last' or 'all'"
    for turn in turns:
        before, after = render(turn, add_generation_prompt=True), render(turn + 1)
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            raise DataError(
                f"the chat template rewrites turn {turn}, so its targets cannot be told",
                where=where,
                cure=f"Use train_on={others} with this model.",
            )
        # What follows the end-of-turn token is the template's own white space.
        spans.append((len(before), len(after.rstrip())))
    return spans


def _pair(row: Mapping[str, object], where: str) -> list[dict[str, object]]:
    return [
        {"role": "user", "content": text_of(row, "prompt", where)},
        {"role": "assistant", "content": text_of(row, "completion", where)},
    ]
