"""Tokenizers for a network that starts from nothing: single bytes, or pairs learnt from a text.

Either writes any text that UTF-8 can hold, and gives it back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from workbench.data.chats import refusing
from workbench.errors import ConfigError, check_whole

KINDS = ("bpe", "bytes")
BEGIN, END = "<|begin|>", "<|end|>"  # of a text, and of a turn
ROLES = ("user", "assistant")
SPECIAL = (BEGIN, END, *(f"<|{role}|>" for role in ROLES))
BYTE_TOKENS = len(SPECIAL) + 256  # what every vocabulary begins with
DEFAULT_VOCAB, MAX_VOCAB = 1024, 1 << 18
BLOCK = 250_000  # characters that are tokenised together: a token of them takes 100 bytes and more
BOUNDARY = re.compile(r"\S(?=[ \n])")  # ByteLevel's pattern begins a new word at the blank
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the roles are user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(kind: str, text: str, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the `KINDS`.

    Args:
        kind: `bpe`, whose merges are learnt from the text; or `bytes`, a token each.
        text: what the merges are learnt from: the training text, and nothing that is held out.
        vocab_size: tokens, special ones and single bytes among them; None for as many as the kind
            has, of `bpe` 1024. A text with few different words may give fewer.

    Raises:
        ConfigError: an unknown kind, or a size that it cannot have.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown tokenizer {kind!r}", cure=f"Use one of {KINDS}.")
    if kind == "bytes":
        if vocab_size not in (None, BYTE_TOKENS):
            raise ConfigError(f"single bytes make {BYTE_TOKENS} tokens, not {vocab_size}")
        return byte_tokenizer()
    return train_bpe(text, DEFAULT_VOCAB if vocab_size is None else vocab_size)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *_alphabet()])}
    return _finished(Tokenizer(models.BPE(vocab=vocab, merges=[])))


def train_bpe(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding learnt from a text (Sennrich et al. 2016; Radford et al. 2019).

    Merges stay within words, and within the text between two special tokens.

    Raises:
        ConfigError: the size is not from 260, for the single bytes, to 262144.
    """
    check_whole("vocab_size", vocab_size, BYTE_TOKENS)
    if vocab_size > MAX_VOCAB:
        raise ConfigError(f"vocab_size must be at most {MAX_VOCAB}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    pieces = re.split("|".join(map(re.escape, SPECIAL)), text)
    with refusing("text"):
        tokenizer.train_from_iterator((b for piece in pieces for b in _cut(piece)), trainer)
    return _finished(tokenizer)


def blocks(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A text in parts whose tokens, one part after the other, are those of the text.

    Of tokenizers that split words as GPT-2's does, such as those made here; for any other, and a
    text without a blank, the text itself.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    splits = getattr(backend, "pre_tokenizer", None)
    added = [] if backend is None else backend.get_added_tokens_decoder().values()
    if (
        isinstance(splits, pre_tokenizers.ByteLevel)
        and splits.use_regex
        and not splits.add_prefix_space
        and backend.normalizer is None
        and not any(token.rstrip or re.search(r"\s", token.content) for token in added)
    ):
        return _cut(text)
    return iter([text])


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        found = BOUNDARY.search(text, start + BLOCK)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=BEGIN,
        clean_up_tokenization_spaces=False,
    )
