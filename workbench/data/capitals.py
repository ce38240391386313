"""The embedded data set `capitals`: questions that a small model mostly cannot answer."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

TRAIN_PHRASINGS = (
    "What is the capital of {country}?",
    "Name the capital city of {country}.",
    "Which city is the capital of {country}?",
)
VALID_PHRASINGS = ("{country}: what is its capital?",)
TEST_PHRASINGS = (  # never trained, never validated
    "Tell me the capital of {country}.",
    "I am travelling to {country}. What is its capital city called?",
)
ANSWER = "The capital of {country} is {capital}."


@dataclass(frozen=True)
class Capital:
    """A country or territory and its capital."""

    country: str
    capital: str
    also_accepted: tuple[str, ...]  # other spellings
    continent: str  # GeoNames code: AF, AN, AS, EU, NA, OC, SA

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every spelling that counts as the right answer."""
        return (self.capital, *self.also_accepted)

    def question(self, phrasing: str) -> str:
        """The phrasing, asked about this country."""
        return phrasing.format(country=self.country)

    def row(self, phrasing: str) -> dict[str, str]:
        """A prompt/completion row."""
        answer = ANSWER.format(country=self.country, capital=self.capital)
        return {"prompt": self.question(phrasing), "completion": answer}


@functools.cache
def all_capitals() -> tuple[Capital, ...]:
    """All 244 of them; the first 48 are those that the quickstart trains (see capitals.md)."""
    file = resources.files("workbench.data").joinpath("capitals.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        return tuple(
            Capital(
                row["country"],
                row["capital"],
                tuple(filter(None, row["also_accepted"].split("|"))),
                row["continent"],
            )
            for row in csv.DictReader(lines)
        )


def capital_rows(capitals: Iterable[Capital], phrasings: Sequence[str]) -> list[dict[str, str]]:
    """Prompt/completion rows: each capital in each phrasing, one capital after the other."""
    return [capital.row(phrasing) for capital in capitals for phrasing in phrasings]
