"""Preference rows: a prompt, the answer that was chosen, and the one that was rejected."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.data.chats import check_messages
from workbench.data.datasets import Dataset
from workbench.data.examples import Example, encode_row
from workbench.data.row_sources import SPLITS, read_source
from workbench.data.rows import text_of
from workbench.data.special_tokens import require_tokenizer
from workbench.errors import DataError

SIDES = ("chosen", "rejected")
CURE = "A preference row has 'prompt', 'chosen' and 'rejected'."

Messages = list[Mapping[str, object]]


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """Two tokenised answers to one prompt, each with it; only the answers' tokens are targets."""

    chosen: Example
    rejected: Example
    where: str  # file and line, for messages

    def __len__(self) -> int:
        """Tokens of the longer side: the two are padded together."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def sides(self) -> tuple[Example, Example]:
        """What goes through the network for this row: chosen, rejected."""
        return self.chosen, self.rejected

    @property
    def truncated(self) -> bool:
        """Whether a side was cut to max_length."""
        return self.chosen.truncated or self.rejected.truncated

    @property
    def num_targets(self) -> int:
        """Number of supervised targets of both sides."""
        return self.chosen.num_targets + self.rejected.num_targets

    @property
    def num_spelled(self) -> int:
        """Special tokens that the messages of both sides spell, encoded as text."""
        return self.chosen.num_spelled + self.rejected.num_spelled


@dataclass(frozen=True, repr=False)
class PreferenceDataset(Dataset):
    """Tokenised preference pairs: `train`, `valid` and `test` are lists of `PreferencePair`."""

    unit = "pairs"


def load_preferences(
    source: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_length: int = 2048,
    allow_special_tokens: bool = False,
    valid_fraction: float = 0.1,
    seed: int = 0,
) -> PreferenceDataset:
    """Read and tokenise preference pairs.

    Args:
        source: a folder of train.jsonl (and valid, test), a .jsonl file to split, or rows in
            memory: a pandas frame, a Hugging Face data set, a list; see `read_source`. For the
            rows' forms see `encode_pair`.
        limit: training pairs that are used, from the start; None for all.
        max_length: tokens of each side that are kept; `truncated` counts the pairs cut.
        allow_special_tokens: whether those that messages spell act, see `encode_row`.
        valid_fraction: share of the pairs that validate, of what comes without splits.
        seed: of that split.

    Raises:
        DataError: nothing there, or a row that is no pair; names the line or the row.
        ConfigError: a setting is out of range, no tokenizer, or a stream without a limit.
    """
    require_tokenizer(tokenizer)
    found = read_source(source, limit, valid_fraction, seed)
    encode = functools.partial(
        encode_pair,
        tokenizer=tokenizer,
        max_length=max_length,
        allow_special_tokens=allow_special_tokens,
    )
    encoded = {
        split: [encode(row, where=place) for place, row in found.splits.get(split, ())]
        for split in SPLITS
    }
    return PreferenceDataset(found.name, **encoded, allow_special_tokens=allow_special_tokens)


def encode_pair(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    allow_special_tokens: bool = False,
    where: str = "row",
) -> PreferencePair:
    """Tokenise both sides of a preference row; the targets are the answer, up to its end token.

    Args:
        row: `prompt`, `chosen` and `rejected` (with optional `tools`). The prompt is a text, what
            the user says, or a list of messages; a side is a text, the assistant's answer as a
            list of one message, or the whole chat, beside which the prompt may be left out.
        tokenizer: with a chat template.
        max_length: tokens of each side that are kept, from the start.
        allow_special_tokens: whether special tokens that messages spell act, see `encode_row`.
        where: the row's place, for messages.

    Raises:
        DataError: a side is missing, empty or no answer, the sides are equal, their prompts are
            not, or max_length leaves nothing of an answer or nothing that tells the sides apart.
    """
    chats = {side: _chat(row, side, where) for side in SIDES}
    _require_one_prompt(chats["chosen"][:-1], chats["rejected"][:-1], where)
    if chats["chosen"][-1] == chats["rejected"][-1]:
        raise DataError("'chosen' and 'rejected' are the same answer", where=where)
    chosen, rejected = (
        encode_row(
            {"messages": chat, "tools": row.get("tools")},
            tokenizer,
            max_length=max_length,
            train_on="last",
            allow_special_tokens=allow_special_tokens,
            where=f"{where}, {side}",
        )
        for side, chat in chats.items()
    )
    _require_apart(chosen, rejected, max_length, where)
    return PreferencePair(chosen, rejected, where)


def _chat(row: Mapping[str, object], side: str, where: str) -> Messages:
    """Prompt and answer of a side, as messages of which the last is the assistant's."""
    chat = _whole_chat(row, side, where)
    if not (chat[-1].get("content") or chat[-1].get("tool_calls")):
        raise DataError(f"{side!r} is an empty answer", where=where, cure=CURE)
    return chat


def _whole_chat(row: Mapping[str, object], side: str, where: str) -> Messages:
    given, prompt, place = row.get(side), row.get("prompt"), f"{where}, {side}"
    if given is None:
        raise DataError(f"has no {side!r}", where=where, cure=CURE)
    if isinstance(given, str):
        if prompt is None:
            raise DataError(f"has no 'prompt', and {side!r} is no chat", where=where, cure=CURE)
        answer = {"role": "assistant", "content": text_of(row, side, where)}
        return [*_prompt(row, where), answer]
    if not isinstance(given, list):
        what = f"{side!r} must be a text or a list of messages, got {type(given).__name__}"
        raise DataError(what, where=where, cure=CURE)
    messages = check_messages(given, place)
    if prompt is not None and messages[0]["role"] == "assistant":
        messages = [*_prompt(row, where), *messages]
    elif prompt is not None and not _begins_with(messages[:-1], prompt):
        raise DataError("the chat's prompt is not the row's 'prompt'", where=place)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            "must end with the assistant's answer to something",
            where=place,
            cure="Give an answer, or a whole chat whose last message is the answer.",
        )
    return messages


def _prompt(row: Mapping[str, object], where: str) -> Messages:
    if isinstance(row["prompt"], list):
        return check_messages(row["prompt"], f"{where}, prompt")
    return [{"role": "user", "content": text_of(row, "prompt", where)}]


def _begins_with(messages: Messages, prompt: object) -> bool:
    """Whether all but the answer of a chat is the prompt; a text is what the user said last."""
    if isinstance(prompt, str):
        return bool(messages) and messages[-1].get("content") == prompt
    return messages == prompt


def _require_one_prompt(chosen: Messages, rejected: Messages, where: str) -> None:
    if chosen == rejected:
        return
    differs = [one != other for one, other in zip(chosen, rejected)]
    first = differs.index(True) if True in differs else len(differs)
    raise DataError(
        f"the prompt differs between 'chosen' and 'rejected' (message {first})",
        where=where,
        cure="Only the last message, the assistant's, may differ.",
    )


def _require_apart(chosen: Example, rejected: Example, max_length: int, where: str) -> None:
    """Raise unless the sides are one prompt's tokens, then different ones."""
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise DataError(
            f"'chosen' and 'rejected' are the same within max_length={max_length} tokens",
            where=where,
            cure="Raise max_length.",
        )
    if not np.array_equal(_prompt_tokens(chosen), _prompt_tokens(rejected)):
        raise DataError(
            "the answers change the tokens of the prompt before them",
            where=where,
            cure="Let neither answer begin with white space.",
        )


def _prompt_tokens(side: Example) -> np.ndarray:
    return side.tokens[: np.flatnonzero(side.loss_mask)[0]]
