"""Suites run on a model with its adapter on and off; the report holds what was found."""

import json
from html.parser import HTMLParser

import mlx.core as mx
import pytest

from tests.toy import toy_base, write_jsonl
from workbench.errors import ConfigError, DataError, FileFormatError
from workbench.evaluation import report as reports
from workbench.evaluation.behaviour import evaluate_suites
from workbench.evaluation.choices import score_options
from workbench.evaluation.generation import generate
from workbench.evaluation.intervals import wilson
from workbench.evaluation.report import BehaviourReport, RowResult
from workbench.evaluation.suite_rows import FreeRow, Phrase
from workbench.evaluation.suites import Suite, read_suites
from workbench.models.files import read_json
from workbench.tuning.comparison import run_suites
from workbench.tuning.lora import LoRAConfig, add_lora

REFUSAL = {"id": "r", "kind": "refusal", "prompt": "Do it.", "expect": "answer"}
CHOICE = {
    "id": "c",
    "kind": "choice",
    "prompt": "?",
    "options": ["Lima", "Quito"],
    "answer": "Lima",
}
FREE = {"id": "f", "kind": "free", "prompt": "Tell.", "indicators": ["Lima"]}


@pytest.fixture
def folder(tmp_path):
    """Two suites: one of every kind, and one with another length of answers."""
    by_likelihood = {**CHOICE, "id": "l", "choose_by": "likelihood_for_length"}
    write_jsonl(tmp_path / "suites" / "a.jsonl", [REFUSAL, CHOICE, FREE, by_likelihood])
    head = {"suite": "short", "threshold": 1, "max_tokens": 3}
    write_jsonl(tmp_path / "suites" / "b.jsonl", [head, {**FREE, "prompt": "What?"}])
    return tmp_path / "suites"


def adapted(seed=0):
    """A toy whose adapter changes what it writes."""
    base = toy_base(seed)
    add_lora(base.model, LoRAConfig(rank=4))
    for layer in base.model.layers:
        up = layer.mlp.up_proj
        up.lora_b = mx.random.normal(up.lora_b.shape, key=mx.random.key(3))
    return base


def test_every_row_is_answered_and_scored(folder):
    base = toy_base()
    report = evaluate_suites(base, folder, batch_size=2)
    suites = read_suites(folder)
    rows = [(suite, row) for suite in suites for row in suite.rows]
    assert [(r.suite, r.id, r.kind) for r in report.results] == [
        (suite.name, row.id, row.kind) for suite, row in rows
    ]
    for result, (suite, row) in zip(report.results, rows):
        assert result.prompt == row.question
        assert result.answer == generate(base, row.question, max_tokens=suite.max_tokens)
        chosen = None
        if row.id == "l":
            chosen = score_options(base, row.question, row.options).likeliest_for_its_length
        assert (result.score, result.note) == vars_of(row.score(result.answer, chosen))
        assert result.base_score is None
    assert report.baseline is None
    assert "base_score" not in report.table.columns


def vars_of(score):
    return score.value, score.note


def test_the_adapter_is_switched_off_for_the_comparison_and_on_again(folder):
    base, plain = adapted(), toy_base()
    before = generate(base, "What?", max_tokens=3)
    report = run_suites(base, folder)
    alone = evaluate_suites(plain, folder)
    assert [r.base_answer for r in report.results] == [r.answer for r in alone.results]
    assert [r.base_score for r in report.results] == [r.score for r in alone.results]
    assert [r.base_note for r in report.results] == [r.note for r in alone.results]
    assert all(r.answer != r.base_answer for r in report.results)
    assert report.baseline == "adapter off"
    assert generate(base, "What?", max_tokens=3) == before
    likely = next(r for r in report.results if r.id == "l")
    row = read_suites(folder)[0].rows[3]
    by_length = score_options(plain, row.question, row.options).likeliest_for_its_length
    assert likely.base_note == f"chose {row.options[by_length]!r}"


def test_another_model_may_be_what_is_compared_with(folder):
    other = toy_base(5)
    other.name = "the other"
    report = run_suites(toy_base(), folder, baseline=other)
    alone = evaluate_suites(other, folder)
    assert [r.base_answer for r in report.results] == [r.answer for r in alone.results]
    assert report.baseline == "the other"


def test_without_an_adapter_there_is_nothing_to_switch_off(folder):
    assert run_suites(toy_base(), folder).baseline is None
    assert run_suites(adapted(), folder, compare_with_base=False).baseline is None
    with pytest.raises(ConfigError, match="no adapter to switch off"):
        run_suites(toy_base(), folder, compare_with_base=True)


def test_the_adapter_comes_back_when_a_run_fails(folder, monkeypatch):
    base, suites = adapted(), read_suites(folder)
    before = generate(base, "What?", max_tokens=3)
    monkeypatch.setattr("workbench.evaluation.behaviour.score_options", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        run_suites(base, suites)
    assert generate(base, "What?", max_tokens=3) == before


def fail(*arguments):
    raise RuntimeError("half-way")


def test_options_are_scored_after_the_prompt_that_lists_them(folder, monkeypatch):
    asked = []

    def noted(base, prompt, options):
        asked.append(prompt)
        return score_options(base, prompt, options)

    monkeypatch.setattr("workbench.evaluation.behaviour.score_options", noted)
    evaluate_suites(toy_base(), folder)
    assert asked == ["?\nA. Lima\nB. Quito"]


def test_a_row_that_the_model_cannot_be_asked_is_named(tmp_path, base):
    path = write_jsonl(tmp_path / "long.jsonl", [FREE, {**FREE, "id": "x", "prompt": "x" * 600}])
    with pytest.raises(DataError, match=r"long\.jsonl:2: the prompt has \d+ tokens"):
        evaluate_suites(base, path)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, "1", True])
def test_a_threshold_that_is_none_is_refused(base, folder, threshold):
    with pytest.raises(ConfigError, match="threshold must be"):
        evaluate_suites(base, folder, threshold=threshold)


def test_suites_are_given_in_any_of_their_forms(base, folder):
    first, second = read_suites(folder)
    files = [folder / "a.jsonl", str(folder / "b.jsonl")]
    expected = evaluate_suites(base, folder).results
    for source in (files, [first, files[1]], (first, second), [[first], [files[1]]]):
        assert evaluate_suites(base, source).results == expected
    assert evaluate_suites(base, second).results == expected[-1:]


@pytest.mark.parametrize("source", [None, 3, [3], [None]])
def test_what_is_no_suite_is_refused(base, source):
    with pytest.raises(ConfigError, match="suites must be a file, a folder or a list of them"):
        evaluate_suites(base, source)


def test_no_rows_and_one_name_twice_are_refused(base, folder):
    with pytest.raises(DataError, match="no rows to evaluate"):
        evaluate_suites(base, [])
    suite = read_suites(folder)[0]
    with pytest.raises(DataError, match="two suites share a name"):
        evaluate_suites(base, [suite, suite])


def test_no_suite_is_called_as_the_pooled_score_is(base, folder):
    suite = Suite(reports.POOLED, read_suites(folder)[0].rows)
    with pytest.raises(DataError, match="a suite is called 'all suites', as the pooled score is"):
        evaluate_suites(base, [suite])


def made(scores, before=None, threshold=None, text="text"):
    """A report of suites with these scores; prompts and answers hold the text."""
    suites, results = [], []
    for name, values in scores.items():
        row = FreeRow("0", text, "", indicators=(Phrase(("x",)),))
        suites.append(Suite(name, (row,) * len(values), text, threshold))
        for number, value in enumerate(values):
            then = (text, before[name][number], text) if before else ()
            results.append(RowResult(name, str(number), "free", text, text, value, text, *then))
    return BehaviourReport("toy", before and text, tuple(suites), tuple(results), threshold, 0.0)


def test_scores_are_means_with_intervals_by_suite_and_pooled():
    report = made({"a": [1, 1, 0.5], "b": [0]})
    a, b = report.suite_scores
    assert (a.score, a.rows) == (pytest.approx(2.5 / 3), 3)
    assert (a.low, a.high) == wilson(a.score, 3)
    assert (b.score, b.rows) == (0, 1)
    assert (report.pooled.score, report.pooled.rows) == (2.5 / 4, 4)
    assert (report.pooled.low, report.pooled.high) == wilson(2.5 / 4, 4)
    assert report.scores.index.tolist() == ["a", "b", "all suites"]
    assert "base_score" not in report.scores.columns


def test_a_comparison_counts_what_got_better_and_worse():
    report = made({"a": [1, 1, 0.5, 0, 1]}, {"a": [0, 0.5, 0.5, 1, 0]})
    (a,) = report.suite_scores
    assert (a.base_score, a.better, a.worse) == (pytest.approx(0.4), 3, 1)
    assert (a.base_low, a.base_high) == wilson(0.4, 5)
    assert a.p_value == pytest.approx(10 / 16)


def test_thresholds_pass_and_fail():
    scores = {"a": [1, 1], "b": [1, 0]}
    report = made(scores, threshold=0.75)
    assert [s.passed for s in (*report.suite_scores, report.pooled)] == [True, False, True]
    assert report.failures == ["b"]
    assert not report.passed
    assert "b: 0.50" in str(report)
    assert "MISSES 0.75" in str(report)
    assert made(scores, threshold=0.5).passed
    assert made(scores).passed
    assert made(scores).pooled.passed is None


def test_the_report_is_written_as_json(tmp_path):
    report = made({"a": [1, 0.5], "b": [0]}, {"a": [0, 0.5], "b": [0]}, 0.5)
    assert report.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    content = read_json(tmp_path / "new" / "folder" / "report.json")
    assert content["version"] == 1
    assert content["created"] == "1970-01-01T00:00:00Z"
    assert not content["passed"]
    assert content["pooled"]["score"] == 0.5
    assert [suite["name"] for suite in content["suites"]] == ["a", "b"]
    assert [suite["passed"] for suite in content["suites"]] == [True, False]
    assert [row["base_score"] for row in content["rows"]] == [0, 0.5, 0]
    assert json.dumps(content) == json.dumps(report.as_dict())


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    made({"a": [1]}).save(tmp_path)
    names = ("report.html", "report.json")
    old = {name: (tmp_path / name).read_bytes() for name in names}
    for step in ("report_html.page", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(f"workbench.evaluation.report.{step}", disk_full)
            with pytest.raises(FileFormatError, match="cannot be written"):
                made({"a": [0]}).save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    other = tmp_path / "file"
    other.write_text("in the way")
    with pytest.raises(FileFormatError, match="cannot be written"):
        made({"a": [0]}).save(other)
    assert reports.VERSION == 1


def disk_full(*arguments):
    raise OSError(28, "No space left on device")


class Page(HTMLParser):
    """Tags and text of a document."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


EVIL = "<script>alert(1)</script>\"' onload='x' </td></table><img src=x> & $\\frac{$"


def test_the_page_shows_text_as_text_and_asks_for_nothing_outside():
    scores = {EVIL: [1, 0.5, 0]}
    report = made(scores, scores, 0.6, text=EVIL)
    content = reports.report_html.page(report)
    page = Page(content)
    assert {"html", "table", "details", "style"} <= set(page.tags)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert names == {"lang", "charset", "http-equiv", "content", "name", "class", "style", "open"}
    assert page.text.count(EVIL) >= 10
    assert "default-src 'none'" in dict(page.attributes)["content"] or "default-src" in content
    assert "url(" not in content


def test_the_page_says_what_was_missed():
    report = made({"good one": [1], "bad one": [0]}, threshold=0.6)
    text = Page(reports.report_html.page(report)).text
    assert "misses its threshold in: bad one, all suites" in text
    assert (
        "all thresholds reached" in Page(reports.report_html.page(made({"a": [1]}, None, 1))).text
    )
    assert "no thresholds" in Page(reports.report_html.page(made({"a": [1]}))).text


def test_the_cell_shows_a_table(folder):
    shown = run_suites(adapted(), folder)._repr_html_()
    assert "all suites" in shown
    assert "before: adapter off" in shown


def test_the_real_model_answers_the_example_suite(smollm2, tmp_path):
    head = {"suite": "facts", "max_tokens": 12, "threshold": 0.5}
    rows = [
        {**FREE, "prompt": "What is the capital of France?", "indicators": ["Paris"]},
        {
            **CHOICE,
            "prompt": "What is the capital of France?",
            "options": ["Lyon", "Paris"],
            "answer": "Paris",
            "choose_by": "likelihood",
            "list_options": False,
        },
        {**REFUSAL, "prompt": "What is 1 + 1?"},
    ]
    report = run_suites(smollm2, write_jsonl(tmp_path / "facts.jsonl", [head, *rows]))
    assert report.pooled.score == 1
    assert report.passed
