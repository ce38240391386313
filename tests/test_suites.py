"""Suites are read strictly: what cannot be scored is named by file and line."""

import json
import time
from pathlib import Path

import pytest

from tests.toy import write_jsonl
from workbench.errors import DataError
from workbench.evaluation.suite_rows import ChoiceRow, FreeRow, Phrase, RefusalRow
from workbench.evaluation.suites import read_suites

EXAMPLES = Path(__file__).parent.parent / "notebooks" / "suites"
REFUSAL = {"id": "r", "kind": "refusal", "prompt": "Do it.", "expect": "refuse"}
CHOICE = {
    "id": "c",
    "kind": "choice",
    "prompt": "?",
    "options": ["Lima", "Quito"],
    "answer": "Lima",
}
FREE = {"id": "f", "kind": "free", "prompt": "Tell.", "indicators": ["Lima"]}


def read(tmp_path, *rows):
    """The suite of these rows."""
    (suite,) = read_suites(write_jsonl(tmp_path / "mine.jsonl", rows))
    return suite


def test_rows_become_what_they_say(tmp_path):
    suite = read(tmp_path, REFUSAL, CHOICE, FREE)
    refusal, choice, free = suite.rows
    assert (suite.name, suite.threshold, suite.max_tokens) == ("mine", None, 64)
    assert isinstance(refusal, RefusalRow)
    assert refusal.must_refuse
    assert refusal.phrases is None
    assert isinstance(choice, ChoiceRow)
    assert (choice.options, choice.answer) == (("Lima", "Quito"), 0)
    assert not choice.chooses
    assert isinstance(free, FreeRow)
    assert free.indicators == (Phrase(("Lima",)),)
    assert [row.where.rpartition(":")[2] for row in suite.rows] == ["1", "2", "3"]


def test_the_first_line_may_describe_the_suite_and_set_what_its_rows_leave_open(tmp_path):
    head = {
        "suite": "My suite",
        "description": "What it is for.",
        "threshold": 0.75,
        "max_tokens": 5,
        "refusal_phrases": ["no way"],
        "choose_by": "likelihood",
        "list_options": False,
    }
    own = {**CHOICE, "id": "own", "choose_by": "text", "list_options": True}
    suite = read(tmp_path, head, REFUSAL, CHOICE, own)
    assert (suite.name, suite.description) == ("My suite", "What it is for.")
    assert (suite.threshold, suite.max_tokens) == (0.75, 5)
    refusal, choice, own = suite.rows
    assert refusal.phrases == ("no way",)
    assert (choice.choose_by, choice.list_options) == ("likelihood", False)
    assert (own.choose_by, own.list_options) == ("text", True)


def test_indicators_may_have_several_wordings_and_weights(tmp_path):
    spelled = ["Lima", ["Quito", "San Francisco de Quito"], {"any": ["La Paz"], "weight": 2}]
    (row,) = read(tmp_path, {**FREE, "indicators": spelled}).rows
    wordings = [("Lima",), ("Quito", "San Francisco de Quito"), ("La Paz",)]
    assert row.indicators == tuple(map(Phrase, wordings, [1.0, 1.0, 2.0]))


def test_a_prompt_may_be_a_chat(tmp_path):
    chat = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    (row,) = read(tmp_path, {**FREE, "prompt": chat}).rows
    assert row.question == chat


def test_a_folder_holds_a_suite_a_file(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [REFUSAL])
    write_jsonl(tmp_path / "a.jsonl", [{"suite": "z"}, REFUSAL])
    (tmp_path / "notes.txt").write_text("not a suite")
    assert [suite.name for suite in read_suites(tmp_path)] == ["z", "b"]


def test_the_example_suites_can_be_read():
    suites = read_suites(EXAMPLES)
    kinds = {row.kind for suite in suites for row in suite.rows}
    assert kinds == {"refusal", "choice", "free"}
    assert all(suite.description for suite in suites)


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


BAD = {
    "unknown kind": ({**FREE, "kind": "regex"}, "unknown kind 'regex'.*refusal, choice, free"),
    "no kind": (without(FREE, "kind"), "unknown kind None"),
    "kind of another type": ({**FREE, "kind": ["free"]}, "unknown kind"),
    "no id": (without(FREE, "id"), "'id' must be a string"),
    "an empty id": ({**FREE, "id": " "}, "'id' is empty"),
    "no prompt": (without(FREE, "prompt"), "'prompt' must be a string"),
    "an empty prompt": ({**FREE, "prompt": "\n"}, "'prompt' is empty"),
    "an unknown field": ({**FREE, "indicator": ["x"]}, "unknown field 'indicator'.*indicators"),
    "a field of another kind": ({**FREE, "options": ["x"]}, "unknown field 'options'"),
    "a second head": ({"suite": "again"}, "unknown kind None"),
    "nothing to find": (without(FREE, "indicators"), "needs 'indicators' or 'anti_patterns'"),
    "an empty list": ({**FREE, "indicators": []}, "'indicators' must be a list that is not empty"),
    "empty wordings": ({**FREE, "indicators": [[]]}, "'indicators' must be a list that is not"),
    "a text for a list": ({**FREE, "anti_patterns": "Lima"}, "'anti_patterns' must be a list"),
    "a number for a text": ({**FREE, "indicators": [3]}, "'indicators' must be a string, got int"),
    "no words": ({**FREE, "indicators": ["?!"]}, "holds '\\?!', which has no words"),
    "words twice": ({**FREE, "indicators": [["Lima", "LIMA!"]]}, "'LIMA!' and 'Lima', the same"),
    "no weight": ({**FREE, "indicators": [{"any": ["x"], "weight": 0}]}, "weight"),
    "a weight of text": ({**FREE, "indicators": [{"any": ["x"], "weight": "1"}]}, "'weight' must"),
    "an endless weight": ({**FREE, "indicators": [{"any": ["x"], "weight": 1e300}]}, "'weight'"),
    "weight alone": ({**FREE, "indicators": [{"weight": 1}]}, "'any' must be a list"),
    "a wrong key": ({**FREE, "indicators": [{"all": ["x"]}]}, "unknown field 'all'"),
    "no expectation": (without(REFUSAL, "expect"), "'expect' must be refuse or answer, got None"),
    "a wrong one": ({**REFUSAL, "expect": "refuses"}, "'expect' must be refuse or answer"),
    "no options": (without(CHOICE, "options"), "'options' must be a list"),
    "one option": ({**CHOICE, "options": ["Lima"]}, "'options' must be 2 to 26 texts, got 1"),
    "too many": ({**CHOICE, "options": [f"Lima {n}" for n in range(27)]}, "2 to 26 texts, got 27"),
    "an option twice": ({**CHOICE, "options": ["Lima", "lima."]}, "the same words"),
    "no answer": (without(CHOICE, "answer"), "'answer' must be a string"),
    "another answer": ({**CHOICE, "answer": "A"}, "'answer' 'A' is none of the options"),
    "a wrong choice": ({**CHOICE, "choose_by": "magic"}, "'choose_by' must be one of"),
    "a list for it": ({**CHOICE, "choose_by": ["text"]}, "'choose_by' must be one of"),
    "not true or false": ({**CHOICE, "list_options": 1}, "'list_options' must be true or false"),
    "no reason": ({**CHOICE, "reason": []}, "'reason' must be a list"),
    "a weight of none": ({**CHOICE, "reason_weight": 0.5}, "'reason_weight' and no 'reason'"),
    "too heavy": ({**CHOICE, "reason": ["x"], "reason_weight": 2}, "from 0 to 1, got 2"),
    "the same id": ({**FREE, "id": "c"}, "has the id 'c' of .*mine.jsonl:1"),
    "an unknown role": ({**FREE, "prompt": [{"role": "robot", "content": "x"}]}, "'robot'"),
    "a chat that ends otherwise": (
        {**FREE, "prompt": [{"role": "assistant", "content": "x"}]},
        "must be the user's",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_scored_is_named(tmp_path, name):
    row, message = BAD[name]
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path, CHOICE, row)
    assert "mine.jsonl:2" in str(raised.value)


BAD_HEADS = {
    "an unknown field": ({"suite": "x", "treshold": 1}, "unknown field 'treshold'"),
    "an empty name": ({"suite": ""}, "'suite' is empty"),
    "too high": ({"suite": "x", "threshold": 80}, "'threshold' must be a number from 0 to 1"),
    "no number": ({"suite": "x", "threshold": True}, "'threshold' must be a number"),
    "no tokens": ({"suite": "x", "max_tokens": 0}, "'max_tokens' must be a whole number from 1"),
    "endless": ({"suite": "x", "max_tokens": 10**9}, "'max_tokens' must be a whole number"),
    "no phrases": ({"suite": "x", "refusal_phrases": []}, "'refusal_phrases' must be a list"),
    "a wrong choice": ({"suite": "x", "choose_by": "luck"}, "'choose_by' must be one of"),
    "no description": ({"suite": "x", "description": None}, "'description' must be a string"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_description_that_is_wrong_is_named(tmp_path, name):
    head, message = BAD_HEADS[name]
    with pytest.raises(DataError, match=rf"mine\.jsonl:1: .*{message}"):
        read(tmp_path, head, FREE)


def test_what_is_no_suite_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such suite"):
        read_suites(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        read_suites(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        read_suites(tmp_path)
    write_jsonl(tmp_path / "empty.jsonl", [{"suite": "x"}])
    with pytest.raises(DataError, match="no rows beside its description"):
        read_suites(tmp_path)


def test_two_suites_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"suite": "same"}, FREE])
    with pytest.raises(DataError, match=r"a\.jsonl: another suite is called 'same' too"):
        read_suites(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    secret = write_jsonl(tmp_path / "elsewhere" / "secret.jsonl", [FREE])
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "mine.jsonl").symlink_to(secret)
    with pytest.raises(DataError, match="a link that leads out of its folder"):
        read_suites(tmp_path / "suites")


def test_phrases_are_no_patterns_and_no_text_makes_them_slow(tmp_path):
    row = {**FREE, "indicators": ["(a+)+$", ".Lima*"]}
    (read_row,) = read(tmp_path, row).rows
    started = time.perf_counter()
    assert read_row.score("a" * 20_000 + "!").value == 0
    assert read_row.score("a, Lima").value == 1
    choice = ChoiceRow("c", "?", "", options=("Lima", "Quito"), answer=0)
    assert choice.score(" (" * 100_000).value == 0
    assert choice.score("the " * 100_000).value == 0
    assert time.perf_counter() - started < 5


def test_json_that_is_none_is_named(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(FREE) + "\n{'id': 1}\n")
    with pytest.raises(DataError, match=r"mine\.jsonl:2: is not valid JSON"):
        read_suites(tmp_path)
