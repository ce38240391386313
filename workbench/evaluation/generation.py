"""Generate text: greedy or sampled, one prompt or many at once, with a KV cache."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from workbench.data import chats
from workbench.errors import ConfigError, DataError, check_number, check_seed, check_whole
from workbench.evaluation.decoding import BatchDecoder, KeptPrompt
from workbench.evaluation.prompts import Prompt, is_single, messages_of
from workbench.models.decoder import Decoder
from workbench.models.loading import BaseModel, embedding_rows, require_base


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_tokens: int = 64  # generated tokens, at most
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # probability mass that is kept (nucleus sampling)
    seed: int = 0

    def __post_init__(self):
        check_whole("max_tokens", self.max_tokens, 1)
        check_seed("seed", self.seed)
        check_number("temperature", self.temperature, 0)
        check_number("top_p", self.top_p, 0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")


def generate(
    base: BaseModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    batch_size: int = 32,
    **settings: object,
) -> str | list[str]:
    """Answer one prompt, or many at once.

    Args:
        base: a loaded model.
        prompts: a string (asked through the chat template, where the tokenizer has one), a chat
            as a list of messages, or a list of either.
        batch_size: prompts that are decoded together; similar lengths share a batch.
        settings: fields of `SamplingConfig`: max_tokens, temperature, top_p, seed.

    Returns:
        The answer's text without special tokens; a list of them for a list of prompts.

    Raises:
        DataError: a prompt is empty, longer than the model's positions, or has unknown ids.
        ConfigError: a setting is out of range, or base is no BaseModel.
    """
    require_base(base)
    if is_single(prompts):
        return generate(base, [prompts], batch_size=batch_size, **settings)[0]
    check_whole("batch_size", batch_size, 1)
    sampling = SamplingConfig(**settings)
    encoded = [encode_prompt(base, prompt) for prompt in prompts]
    answers = generate_answers(base, encoded, sampling, batch_size)
    return [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def generate_answers(
    base: BaseModel,
    encoded: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    batch_size: int,
    is_done: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:
    """Decode any number of token prompts, those of similar lengths together; tokens in order.

    A batch ends early once every answer in it has ended or `is_done`.
    """
    answers: list[list[int]] = [[] for _ in encoded]
    longest = room(base) - sampling.max_tokens
    lengths = [len(ids) for ids in encoded]
    for rows in _batches(lengths, batch_size, longest if isinstance(base.model, Decoder) else 0):
        for step in generate_tokens(base, [encoded[row] for row in rows], sampling):
            for row, token in zip(rows, step):
                if token is not None:
                    answers[row].append(token)
            running = (row for row, token in zip(rows, step) if token is not None)
            if all(is_done(answers[row]) for row in running):
                break
    return answers


def stream(
    base: BaseModel, prompt: Prompt, *, kept: KeptPrompt | None = None, **settings: object
) -> Iterator[str]:
    """Yield the answer to one prompt piece by piece, as `generate` would return it whole.

    What `kept` holds of the prompt from an earlier one is not computed again.
    """
    require_base(base)
    sampling, ids, shown = SamplingConfig(**settings), [], ""
    for (token,) in generate_tokens(base, [encode_prompt(base, prompt)], sampling, kept):
        ids.append(token)
        text = base.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half of a character: wait for its other bytes
            yield text[len(shown) :]
            shown = text
    yield base.tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]


def encode_prompt(base: BaseModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the model's answer.

    Special tokens that a chat's messages spell are text; only the template's own act.

    Raises:
        DataError: no tokens, too many, or ids that the embedding does not have; or a chat that
            the template refuses.
    """
    chat = messages_of(prompt, "prompt")
    if isinstance(prompt, str) and not base.tokenizer.chat_template:
        with chats.refusing("prompt"):
            ids = base.tokenizer.encode(prompt)
    else:
        ids = chats.encode_prompt(base.tokenizer, chat, "prompt")
    check_ids(ids, embedding_rows(base.model, base.config))
    if len(ids) >= room(base):
        raise DataError(
            f"the prompt has {len(ids)} tokens, the model has room for {room(base)}",
            cure="Shorten the prompt.",
        )
    return ids


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise DataError unless every id has a row in the embedding; MLX would read beyond it."""
    if not ids:
        raise DataError("the prompt is empty", cure="Give at least one token.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(number for number in ids if not 0 <= number < vocab_size)
        raise DataError(
            f"token id {wrong} is outside the vocabulary of {vocab_size}",
            cure="Tokenizer and model are from different sources: use the pair.",
        )


def generate_tokens(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    kept: KeptPrompt | None = None,
) -> Iterator[list[int | None]]:
    """Decode a batch of token prompts; yields one step's tokens, None for rows that have ended.

    Rows of different lengths are padded on the left, which only our own networks understand;
    for other models the prompts must be of one length. `kept` is for one prompt alone.
    """
    longest = max(len(ids) for ids in prompts)
    num_steps = min(sampling.max_tokens, room(base) - longest)
    decode = BatchDecoder(base.model, prompts, longest + num_steps, kept)
    key = mx.random.key(sampling.seed)
    running = set(range(len(prompts)))
    with evaluating(base.model):
        logits = decode.prefill()
        for step in range(num_steps):
            key, own = mx.random.split(key)
            tokens = _choose_rows(logits, decode.rows, len(prompts), sampling, own)
            chosen = dict(zip(decode.rows, tokens.tolist()))
            running = {row for row in running if chosen[row] not in base.eos_token_ids}
            if not running:
                return
            yield [chosen[row] if row in running else None for row in range(len(prompts))]
            if step + 1 < num_steps:
                logits = decode.next(tokens, running)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def choose(logits: mx.array, sampling: SamplingConfig, key: mx.array) -> mx.array:
    """Next tokens (B,) from logits (B, V): the largest, or a sample of the nucleus.

    Nucleus sampling: Holtzman et al. 2020, section 3.1.
    """
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1)
    logits = logits.astype(mx.float32) / sampling.temperature
    if sampling.top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        ranked = mx.take_along_axis(mx.softmax(logits, axis=-1), order, axis=-1)
        outside = mx.cumsum(ranked, axis=-1) - ranked >= sampling.top_p
        ranked_logits = mx.take_along_axis(logits, order, axis=-1)
        picked = mx.random.categorical(mx.where(outside, -mx.inf, ranked_logits), key=key)
        return mx.take_along_axis(order, picked[:, None], axis=-1)[:, 0]
    return mx.random.categorical(logits, key=key)


def _choose_rows(
    logits: mx.array, rows: Sequence[int], total: int, sampling: SamplingConfig, key: mx.array
) -> mx.array:
    """`choose` for some rows of a batch of `total`, with the noise that they have in the whole."""
    if sampling.temperature == 0 or len(rows) == total:
        return choose(logits, sampling, key)
    whole, rows = mx.zeros((total, logits.shape[1]), dtype=logits.dtype), mx.array(rows)
    whole[rows] = logits
    return choose(whole, sampling, key)[rows]


def room(base: BaseModel) -> int:
    """Positions that the model has, for prompt and answer together."""
    return getattr(base.config, "max_position_embeddings", None) or sys.maxsize


def _batches(lengths: Sequence[int], batch_size: int, paddable: int) -> Iterator[list[int]]:
    """Row numbers that are decoded together: neighbours in length.

    Rows are padded to at most `paddable` tokens: beyond it, padding would take away positions that
    an answer may need, and rows share a batch only with their equals.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    batch: list[int] = []
    for row in order:
        differs = batch and lengths[row] != lengths[batch[0]]
        if (differs and lengths[row] > paddable) or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
