"""Score generated answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import pandas as pd

from workbench.data.capitals import Capital
from workbench.evaluation.generation import generate
from workbench.models.loading import BaseModel

# The typewriter's, quotation marks used for it, and the Hawaiian and Tongan okina.
NO_APOSTROPHES = str.maketrans("", "", "'`\u2018\u2019\u02bb\u02bc")


def contains_answer(text: str, accepted: Sequence[str]) -> bool:
    """Whether one of the accepted answers stands in the text, as whole words.

    Case, accents and punctuation do not count: "N'Djamena" is found in "NDjaména!".
    """
    words = f" {_normalise(text)} "
    return any(f" {_normalise(answer)} " in words for answer in accepted)


def _normalise(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.translate(NO_APOSTROPHES))
    plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return " ".join(re.findall(r"\w+", plain.casefold()))


def ask_capitals(
    base: BaseModel,
    capitals: Sequence[Capital],
    phrasings: Sequence[str],
    *,
    max_tokens: int = 24,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Ask for every capital in every phrasing, greedily, and score the generated text.

    Returns:
        One row a question: phrasing, country, capital, question, answer, correct.
    """
    asked = [(phrasing, capital) for phrasing in phrasings for capital in capitals]
    questions = [capital.question(phrasing) for phrasing, capital in asked]
    answers = generate(base, questions, max_tokens=max_tokens, batch_size=batch_size)
    return pd.DataFrame(
        {
            "phrasing": [phrasing for phrasing, _ in asked],
            "country": [capital.country for _, capital in asked],
            "capital": [capital.capital for _, capital in asked],
            "question": questions,
            "answer": answers,
            "correct": [
                contains_answer(answer, capital.accepted)
                for answer, (_, capital) in zip(answers, asked)
            ],
        }
    )
