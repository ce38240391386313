"""Which tokens a tokenizer reads as special, looked up once and not for every row."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from workbench.errors import check_kind


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer."""

    ids: frozenset[int]
    pattern: re.Pattern  # matches their spellings; the longest, where several fit


def require_tokenizer(tokenizer: object) -> None:
    """Raise ConfigError unless this is one of transformers' tokenizers."""
    kind = PreTrainedTokenizerBase
    check_kind("tokenizer", tokenizer, kind, "Give the model's own: base.tokenizer.")


# Some tokenizers have thousands, and list them in 20 ms.
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, SpecialTokens]] = (
    weakref.WeakKeyDictionary()
)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The tokenizer's special tokens; those that are added later are noticed by count and name."""
    extra = getattr(tokenizer, "extra_special_tokens", ())
    state = len(tokenizer), tokenizer.special_tokens_map, list(extra)
    known, found = _known.get(tokenizer, (None, None))
    if known != state:
        found = _look_up(tokenizer)
        _known[tokenizer] = state, found
    return found


def _look_up(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    special = {n: t for n, t in tokenizer.added_tokens_decoder.items() if t.special}
    contents = sorted((t.content for t in special.values() if t.content), key=len, reverse=True)
    # A token that is looked for in normalised text may be spelled in capitals too.
    ignore_case = any(token.normalized for token in special.values())
    spellings = "|".join(map(re.escape, contents)) or "(?!)"
    return SpecialTokens(frozenset(special), re.compile(spellings, re.I if ignore_case else 0))
