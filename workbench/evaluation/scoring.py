"""Score generated answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import pandas as pd

from workbench.data.capitals import Capital
from workbench.errors import DataError
from workbench.evaluation.generation import generate
from workbench.evaluation.prompts import Prompt
from workbench.models.loading import BaseModel

# The typewriter's, quotation marks used for it, and the Hawaiian and Tongan okina.
NO_APOSTROPHES = str.maketrans("", "", "'`\u2018\u2019\u02bb\u02bc")


def contains_answer(text: str, accepted: Sequence[str]) -> bool:
    """Whether one of the accepted answers stands in the text, as whole words.

    Case, accents and punctuation do not count: "N'Djamena" is found in "NDjaména!".
    """
    words = f" {normalise(text)} "
    return any(f" {normalise(answer)} " in words for answer in accepted)


def is_answer(text: str, accepted: Sequence[str]) -> bool:
    """Whether the text is one of the accepted answers, and nothing beside it.

    Case, accents and punctuation do not count, as in `contains_answer`.
    """
    words = normalise(text)
    return bool(words) and any(words == normalise(answer) for answer in accepted)


def normalise(text: str) -> str:
    """Words in small letters without accents, one space between them, and no punctuation."""
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


def ask_questions(
    base: BaseModel,
    questions: Sequence[tuple[Prompt, Sequence[str]]],
    *,
    max_tokens: int = 24,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Ask each question, greedily, and hold the generated text against its accepted answers.

    Args:
        base: a loaded model.
        questions: (prompt, accepted answers).
        max_tokens, batch_size: as for `generate`.

    Returns:
        One row a question: question, answer, exact (`is_answer`), contains (`contains_answer`).

    Raises:
        DataError: a question without an accepted answer that has words.
    """
    for number, (_, accepted) in enumerate(questions):
        if isinstance(accepted, str) or not accepted or not all(map(normalise, accepted)):
            raise DataError(
                f"accepted answers must be a list of texts with words, got {accepted!r}",
                where=f"question {number}",
            )
    prompts = [prompt for prompt, _ in questions]
    answers = generate(base, prompts, max_tokens=max_tokens, batch_size=batch_size)
    scored = [(answer, accepted) for answer, (_, accepted) in zip(answers, questions)]
    return pd.DataFrame(
        {
            "question": prompts,
            "answer": answers,
            "exact": [is_answer(answer, accepted) for answer, accepted in scored],
            "contains": [contains_answer(answer, accepted) for answer, accepted in scored],
        }
    )
