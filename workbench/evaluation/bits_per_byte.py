"""Bits per byte: how many bits a text takes if a model foretells it; tokenizers cannot hide in it.

A perplexity per token depends on how long the tokens are; this does not, so that models with
other tokenizers, and models that count bytes, can be compared (Gao et al. 2020, The Pile, 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from workbench.data.examples import Example
from workbench.data.texts import encode_text, num_bytes
from workbench.evaluation.perplexity import perplexity
from workbench.models.loading import BaseModel


@dataclass(frozen=True)
class BitsPerByte:
    """−Σ log2 p over a text's tokens, by its size."""

    bits: float  # of the whole text
    num_bytes: int  # of it in UTF-8
    num_tokens: int

    @property
    def value(self) -> float:
        """Bits a byte."""
        return self.bits / self.num_bytes

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.num_bytes:,} bytes, {self.num_tokens:,} tokens)"


def bits_per_byte(
    base: BaseModel,
    text: str,
    *,
    batch_size: int = 16,
    max_positions: int | None = None,
    stride: int | None = None,
) -> BitsPerByte:
    """What a text costs, in bits a byte, where the model foretells each token from those before.

    Every token counts, the first one after the token that texts begin with. A text longer than
    the model has positions is read in windows that overlap, as by `perplexity`.

    Args:
        base: a loaded model.
        text: of any length; special tokens that it spells act, and count with all their letters.
        batch_size, max_positions, stride: as for `perplexity`.

    Raises:
        DataError: no text, or one that the tokenizer has no tokens for.
        ConfigError: a setting is out of range.
        EvaluationError: the network gives NaN.
    """
    tokens = encode_text(text, base.tokenizer)
    row = Example(tokens, np.ones(len(tokens), dtype=bool), "text")
    found = perplexity(
        base, [row], batch_size=batch_size, max_positions=max_positions, stride=stride
    )
    size = num_bytes(text)
    return BitsPerByte(loss_in_bits(found.loss, found.num_tokens), size, found.num_tokens)


def loss_in_bits(loss: float, num_tokens: int) -> float:
    """Bits of so many tokens with a mean loss in nats a token."""
    return loss * num_tokens / math.log(2)
