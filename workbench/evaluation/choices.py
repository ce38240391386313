"""Multiple choice by log-likelihood: the option that the model finds likeliest is its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.errors import DataError
from workbench.evaluation.likelihood import Likelihood, log_likelihood
from workbench.evaluation.prompts import Prompt
from workbench.models.loading import BaseModel


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its options, and which of them is right."""

    prompt: Prompt
    options: tuple[str, ...]
    answer: int  # place of the right option, from 0

    def __post_init__(self):
        if isinstance(self.options, str) or len(self.options) < 2:
            raise DataError(f"a choice needs two or more options, got {self.options!r}")
        if not all(isinstance(o, str) and o.strip() for o in self.options):
            raise DataError(f"options must be texts that are not empty, got {self.options!r}")
        if len(set(self.options)) < len(self.options):
            raise DataError(f"an option stands there twice: {self.options!r}")
        if self.answer not in range(len(self.options)):
            raise DataError(f"answer {self.answer!r} is no place among {len(self.options)} options")


@dataclass(frozen=True)
class OptionScores:
    """Log-likelihoods of the options of one question."""

    options: tuple[str, ...]
    likelihoods: tuple[Likelihood, ...]

    @property
    def likeliest(self) -> int:
        """Place of the option with the largest sum, `acc` of lm-evaluation-harness.

        It puts long options at a disadvantage.
        """
        totals = [likelihood.total for likelihood in self.likelihoods]
        return totals.index(max(totals))

    @property
    def likeliest_for_its_length(self) -> int:
        """Place of the option with the largest sum for its characters, `acc_norm` there."""
        pairs = zip(self.options, self.likelihoods)
        means = [likelihood.total / len(option) for option, likelihood in pairs]
        return means.index(max(means))


def score_options(base: BaseModel, prompt: Prompt, options: Sequence[str]) -> OptionScores:
    """Log-likelihood of each option as the answer; the prompt goes through the network once.

    Without a chat template, a space comes between prompt and option.
    """
    bare = isinstance(prompt, str) and not base.tokenizer.chat_template
    space = " " if bare and prompt and not prompt[-1:].isspace() else ""
    pairs = [(prompt, space + option) for option in options]
    likelihoods = log_likelihood(base, pairs, batch_size=len(pairs))
    return OptionScores(tuple(options), tuple(likelihoods))


def multiple_choice(base: BaseModel, questions: Sequence[ChoiceQuestion]) -> pd.DataFrame:
    """Let the model choose, by the sum of log-likelihoods and by the sum for the option's length.

    Returns:
        One row a question: question, answer, chosen, correct, chosen_for_length,
        correct_for_length.
    """
    rows = []
    for question in questions:
        scores = score_options(base, question.prompt, question.options)
        by_sum, by_length = scores.likeliest, scores.likeliest_for_its_length
        rows.append(
            {
                "question": question.prompt,
                "answer": question.options[question.answer],
                "chosen": question.options[by_sum],
                "correct": by_sum == question.answer,
                "chosen_for_length": question.options[by_length],
                "correct_for_length": by_length == question.answer,
            }
        )
    return pd.DataFrame(rows)
