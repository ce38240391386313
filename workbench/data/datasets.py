"""A source of rows becomes train, validation and test examples."""

from __future__ import annotations

import functools
import html
import os
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from workbench.data.examples import Example, encode_row
from workbench.data.provenance import with_provenance
from workbench.data.provenance_words import ProvenanceWords
from workbench.data.row_sources import SPLITS, read_source
from workbench.data.special_tokens import require_tokenizer


@dataclass(frozen=True, repr=False)
class Dataset:
    """Tokenised examples, split for training, validation and test.

    Special tokens that a message spells are text, unless `allow_special_tokens`; the description
    counts them.
    """

    name: str
    train: list[Example]
    valid: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    allow_special_tokens: bool = False

    unit = "rows"  # what a split is counted in

    @property
    def truncated(self) -> int:
        """Number of examples, over all splits, that were cut to max_length."""
        return sum(example.truncated for split in SPLITS for example in getattr(self, split))

    @property
    def num_spelled(self) -> int:
        """Number of special tokens, over all splits, that messages spell and that are text."""
        return sum(example.num_spelled for split in SPLITS for example in getattr(self, split))

    def __str__(self) -> str:
        parts = []
        for split in SPLITS:
            examples = getattr(self, split)
            tokens = sum(len(side) for example in examples for side in example.sides)
            targets = sum(example.num_targets for example in examples)
            count = f"{len(examples)} {self.unit}"
            parts.append(f"{split} {count}, {tokens} tokens, {targets} supervised")
        cut = f"; {self.truncated} {self.unit} were cut to max_length" if self.truncated else ""
        spelled = f"; {self.num_spelled} special tokens in messages are text"
        special = spelled if self.num_spelled else ""
        if self.allow_special_tokens:
            special = "; special tokens in messages are control tokens"
        return f"{self.name}: {'; '.join(parts)}{cut}{special}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def load_dataset(
    source: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_length: int = 2048,
    train_on: str = "assistant",
    allow_special_tokens: bool = False,
    valid_fraction: float = 0.1,
    seed: int = 0,
    provenance: str | None = None,
    words: str | os.PathLike | ProvenanceWords | None = None,
) -> Dataset:
    """Read and tokenise a data set.

    Args:
        source: `capitals`, a folder of train.jsonl (and valid, test), a .jsonl file to split, or
            rows in memory: a pandas frame, a Hugging Face data set, a list; see `read_source`.
        limit: training rows that are used, from the start; None for all.
        max_length: tokens of a row that are kept; `Dataset.truncated` counts the rows cut.
        train_on, allow_special_tokens: a chat's targets, and what its texts spell; `encode_row`.
        valid_fraction, seed: share of the rows that validate, drawn where there are no splits.
        provenance: of rows that say none: "score", "refuse" (see `add_provenance`), None: as is.
        words: that rows are scored by: a word file in place of the package's own.

    Raises:
        DataError: nothing there, or a row that cannot be trained on; names the line or the row.
        ConfigError: a setting is out of range, no tokenizer, or a stream without a limit.
        FileFormatError: the word file is malformed.
    """
    require_tokenizer(tokenizer)
    found = read_source(source, limit, valid_fraction, seed)
    how = {"max_length": max_length, "train_on": train_on}
    how["allow_special_tokens"] = allow_special_tokens
    scored = functools.partial(with_provenance, missing=provenance, words=words)
    encoded = {
        split: [encode_row(row, tokenizer, where=at, **how) for at, row in scored(rows)]
        for split, rows in found.splits.items()
    }
    return Dataset(found.name, **encoded, allow_special_tokens=allow_special_tokens)
