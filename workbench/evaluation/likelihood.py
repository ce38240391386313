"""Log-likelihood: what a model makes of text that it did not write."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.data import chats, texts
from workbench.data.batches import Batch, collate
from workbench.data.examples import Example
from workbench.errors import DataError, EvaluationError, check_whole, is_text
from workbench.evaluation.generation import check_ids, evaluating, room
from workbench.evaluation.prompts import Prompt, messages_of
from workbench.models.loading import BaseModel, embedding_rows, require_base
from workbench.models.shared_prompt import find_shared_prompt

MAX_LOGITS = 1 << 26  # numbers that are made at once: 256 MiB in float32


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a model makes of one row's targets, in their order."""

    log_probs: np.ndarray  # (N,) float64, nats
    greedy: np.ndarray  # (N,) bool: whether the target is the likeliest token there


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a continuation, given its prompt."""

    total: float  # nats, summed over the continuation's tokens
    num_tokens: int
    is_greedy: bool  # whether greedy decoding would write it

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / self.num_tokens


def log_likelihood(
    base: BaseModel, pairs: Sequence[tuple[Prompt, str]], *, batch_size: int = 16
) -> list[Likelihood]:
    """How likely the model finds each continuation as what follows its prompt.

    Args:
        base: a loaded model.
        pairs: (prompt, continuation). A prompt goes through the chat template, where the tokenizer
            has one, as in `generate`; see `encode_pair` for where the continuation begins.
        batch_size: rows that go through the network together, at most.

    Raises:
        DataError: no pairs, an empty continuation, a malformed prompt, or more tokens than
            positions.
        ConfigError: base is no BaseModel.
        EvaluationError: the network gives NaN.
    """
    require_base(base)
    if not isinstance(pairs, Iterable):
        raise DataError(f"pairs must be a list of (prompt, text), got {reprlib.repr(pairs)}")
    pairs = list(pairs)
    for number, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DataError(
                f"a pair must be (prompt, text), got {reprlib.repr(pair)}", where=f"pair {number}"
            )
    rows = [encode_pair(base, *pair, f"pair {number}") for number, pair in enumerate(pairs)]
    return [
        Likelihood(float(s.log_probs.sum()), len(s.log_probs), bool(s.greedy.all()))
        for s in score_rows(base, rows, batch_size)
    ]


def encode_pair(base: BaseModel, prompt: Prompt, continuation: str, where: str = "pair") -> Example:
    """Tokens of prompt and continuation; the targets are the continuation's.

    The two are tokenised as one text, and the prompt's own tokens taken off, as in
    lm-evaluation-harness (`TemplateLM._encode_pair`): a prompt without a chat template gives the
    white space at its end to the continuation, and an empty one becomes the token that texts begin
    with. Unlike there, white space at the end of a template stays the template's; and a token into
    which the end of the prompt and the continuation merge is a target.

    Raises:
        DataError: there is nothing to score, or the template or the tokenizer refuses it.
    """
    if not is_text(continuation):
        raise DataError("the continuation must be a text that UTF-8 can hold", where=where)
    if isinstance(prompt, str) and not base.tokenizer.chat_template:
        start = prompt.rstrip()
        with chats.refusing(where):
            before = base.tokenizer.encode(start) if start else []
            whole = base.tokenizer.encode(prompt + continuation)
    else:
        chat = messages_of(prompt, where)
        before, whole = chats.encode_continuation(base.tokenizer, chat, continuation, where)
    differs = (number for number, (a, b) in enumerate(zip(before, whole)) if a != b)
    num_prompt = next(differs, min(len(before), len(whole)))
    if len(whole) == num_prompt:
        raise DataError("the continuation has no tokens", where=where, cure="Give it some text.")
    if num_prompt == 0:
        first = first_token(base, where)
        whole, num_prompt = whole if whole[0] == first and len(whole) > 1 else [first, *whole], 1
    tokens = np.array(whole, dtype=np.int32)
    return Example(tokens, np.arange(len(tokens)) >= num_prompt, where)


def first_token(base: BaseModel, where: str = "prompt") -> int:
    """The token that a text's first is conditioned on; raises DataError if there is none."""
    return texts.first_token(base.tokenizer, where)


def score_rows(base: BaseModel, rows: Sequence[Example], batch_size: int = 16) -> list[TokenScores]:
    """Score the targets of tokenised rows, dropout off.

    Rows are padded on the right, where a causal model does not see it. A model that parts into
    `backbone` and `head` makes logits of the targets only, and our own makes what all rows of a
    batch begin with once.

    Raises:
        DataError: a row has ids outside the vocabulary, or more tokens than the model positions.
        EvaluationError: the network gives NaN.
    """
    check_whole("batch_size", batch_size, 1)
    vocab_size = embedding_rows(base.model, base.config)
    for row in rows:
        check_ids(row.tokens.tolist(), vocab_size)
        if len(row) - 1 > room(base):
            raise DataError(
                f"has {len(row)} tokens, the model has {room(base)} positions", where=row.where
            )
    scores: list[TokenScores | None] = [None] * len(rows)
    with evaluating(base.model):
        for batch in _batches(rows, batch_size, max(1, MAX_LOGITS // vocab_size)):
            for row, scored in zip(batch.rows, _score_batch(base.model, batch, vocab_size)):
                if np.isnan(scored.log_probs).any():
                    raise EvaluationError(
                        "the network's logits are NaN",
                        where=rows[row].where,
                        cure="Check the weights: workbench.numerics names what is not finite.",
                    )
                scores[row] = scored
    return scores


def _batches(rows: Sequence[Example], batch_size: int, max_positions: int) -> Iterator[Batch]:
    """Rows of neighbouring lengths, within a number of positions, which one row may exceed."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    batch: list[int] = []
    for row in order:
        if len(batch) == batch_size or (
            batch and (len(batch) + 1) * len(rows[row]) > max_positions
        ):
            yield collate(rows, batch)
            batch = []
        batch.append(row)
    if batch:
        yield collate(rows, batch)


def _score_batch(model: nn.Module, batch: Batch, vocab_size: int) -> list[TokenScores]:
    inputs, targets, mask = batch.tokens[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:]
    places = np.flatnonzero(mask)
    wanted = mx.array(targets.reshape(-1)[places])
    log_probs, greedy = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    if len(places):
        states, head = _before_head(model, inputs, places)
        size = max(1, MAX_LOGITS // vocab_size)
        for start in range(0, len(places), size):
            logits = head(states[start : start + size]).astype(mx.float32)  # (N, V)
            part = wanted[start : start + size]
            chosen = mx.take_along_axis(logits, part[:, None], axis=-1)[:, 0]
            log_probs.append(np.array(chosen - mx.logsumexp(logits, axis=-1), dtype=np.float64))
            greedy.append(np.array(mx.argmax(logits, axis=-1) == part))
    ends = np.cumsum(mask.sum(axis=1))[:-1]
    parts = zip(np.split(np.concatenate(log_probs), ends), np.split(np.concatenate(greedy), ends))
    return [TokenScores(*part) for part in parts]


def _before_head(model: nn.Module, inputs: np.ndarray, places: np.ndarray) -> tuple:
    """What some of the B · T positions hold, and the function that makes it logits."""
    if getattr(model, "can_share_prompts", False) and inputs.size:
        return model.states_at(inputs, places, find_shared_prompt(inputs)), model.head
    if callable(getattr(model, "backbone", None)) and callable(getattr(model, "head", None)):
        states, head = model.backbone(mx.array(inputs)), model.head
    else:
        states, head = model(mx.array(inputs)), lambda logits: logits
        states = states[0] if isinstance(states, tuple | list) else states
    return states.reshape(-1, states.shape[-1])[mx.array(places)], head
