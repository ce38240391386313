"""An answer counts if it stands in the text as whole words."""

import pytest

import workbench as wb
from workbench.errors import DataError
from workbench.evaluation.scoring import ask_capitals, ask_questions, contains_answer, is_answer

RIGHT = [
    ("The capital of Peru is Lima.", ["Lima"]),
    ("LIMA!", ["Lima"]),
    ("It is São Tomé, I think", ["Sao Tome"]),
    ("It is Sao Tome", ["São Tomé"]),
    ("N\u2019Djamena", ["N'Djamena"]),
    ("Nuku\u02bbalofa", ["Nuku'alofa"]),
    ("Saint-Denis", ["Saint Denis"]),
    ("Washington, D.C.", ["Washington"]),
    ("Kyiv", ["Kiev", "Kyiv"]),
    ("New\nDelhi", ["New Delhi"]),
    ("东京", ["东京"]),
]
WRONG = [
    ("The capital of Peru is Limassol.", ["Lima"]),
    ("Delhi", ["New Delhi"]),
    ("New York and Delhi", ["New Delhi"]),
    ("", ["Lima"]),
    ("Romeo", ["Rome"]),
]


@pytest.mark.parametrize(("text", "accepted"), RIGHT)
def test_right_answers_are_found(text, accepted):
    assert contains_answer(text, accepted)


@pytest.mark.parametrize(("text", "accepted"), WRONG)
def test_wrong_answers_are_not(text, accepted):
    assert not contains_answer(text, accepted)


@pytest.mark.parametrize(
    ("text", "exact"),
    [("Lima", True), (" lima.\n", True), ("The capital is Lima.", False), ("", False)],
)
def test_an_exact_answer_has_nothing_beside_it(text, exact):
    assert is_answer(text, ["Lima", "La Paz"]) == exact


def test_no_text_is_an_exact_answer_of_signs():
    assert not is_answer("", ["…"])


def test_questions_are_scored_both_ways(smollm2):
    asked = [("What is the capital of France?", ["Paris"]), ("What is 1 + 1?", ["Paris"])]
    table = ask_questions(smollm2, asked, max_tokens=12)
    assert table.question.tolist() == [prompt for prompt, _ in asked]
    assert table.contains.tolist() == [True, False]
    assert table.exact.tolist() == [False, False]
    asked = [(prompt, [answer]) for prompt, answer in zip(table.question, table.answer)]
    assert ask_questions(smollm2, asked, max_tokens=12).exact.all()


@pytest.mark.parametrize("accepted", [[], "Lima", ["!"], ["Lima", ""]])
def test_a_question_that_nothing_could_answer_is_named(base, accepted):
    with pytest.raises(DataError, match="question 1: accepted answers must be a list of texts"):
        ask_questions(base, [("Hi", ["x"]), ("Hi", accepted)])


def test_no_capital_is_the_answer_to_another_country_by_its_question():
    # An answer may repeat the question; that alone must not score (apart from city states).
    repeated = [
        capital.country
        for capital in wb.all_capitals()
        if contains_answer(capital.question("What is the capital of {country}?"), capital.accepted)
    ]
    assert len(repeated) <= 20, repeated
    assert {"Singapore", "Monaco"} <= set(repeated)
    assert not {"Peru", "France"} & set(repeated)


def test_every_question_gets_a_row_in_order(base):
    capitals, phrasings = wb.all_capitals()[:3], ("{country}?", "{country}!")
    table = ask_capitals(base, capitals, phrasings, max_tokens=3, batch_size=4)
    names = [capital.country for capital in capitals]
    assert table.question.tolist() == [f"{n}?" for n in names] + [f"{n}!" for n in names]
    assert table.phrasing.tolist() == [p for p in phrasings for _ in capitals]
    assert table.answer.tolist() == wb.generate(base, table.question.tolist(), max_tokens=3)
    assert not table.correct.any()


def test_the_real_model_scores_on_what_it_says(smollm2):
    chosen = [c for c in wb.all_capitals() if c.country in ("France", "Tonga")]
    table = ask_capitals(smollm2, chosen, ["What is the capital of {country}?"], max_tokens=12)
    for _, row in table.iterrows():
        assert row.correct == (row.capital in row.answer)
    assert table.correct[table.country == "France"].all()
