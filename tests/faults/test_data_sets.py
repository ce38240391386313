"""Hostile data sets: each bad line is named by file and line; what is legal is read."""

import json
import os
import re

import pytest

from tests.faults.cases import run_case
from tests.toy import conversation
from workbench.data.rows import MAX_LINE_BYTES

CLASS = "data sets"
READ = "tests.faults.actions:tokenise_data"
ROW = "tests.faults.actions:tokenise_row"
GOOD = b'{"text": "fine"}\n'


def line(row):
    """A row as a line of JSON."""
    return json.dumps(row).encode() + b"\n"


def message(**fields):
    """A chat whose second message is replaced."""
    return line({"messages": [{"role": "user", "content": "a"}, fields]})


LINES = {  # the second line of a file, and what the error says
    "cut": (b'{"text": "a', "not valid JSON"),
    "two objects": (b'{"text": "a"}{"text": "b"}\n', "Extra data"),
    "a list": (b'["text"]\n', "must be a JSON object, got list"),
    "a text": (b'"text"\n', "must be a JSON object, got str"),
    "a number": (b"7\n", "must be a JSON object, got int"),
    "null": (b"null\n", "must be a JSON object, got NoneType"),
    "NaN": (b'{"text": "a", "weight": NaN}\n', "NaN is no JSON value"),
    "infinity": (b'{"text": "a", "weight": -Infinity}\n', "-Infinity is no JSON value"),
    "a number of 5000 digits": (b'{"text": "a", "n": 1' + b"0" * 5000 + b"}\n", "4300"),
    "a key twice": (b'{"text": "a", "text": "b"}\n', "key 'text' twice"),
    "a key twice, deep inside": (
        b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}\n',
        "key 'role' twice",
    ),
    "nested beyond reason": (b'{"text":' + b"[" * 100_000 + b"\n", "nested deeper"),
    "nested a little too deep": (
        b'{"text": "a", "x": ' + b"[" * 70 + b"]" * 70 + b"}\n",
        "nested deeper",
    ),
    "two million values": (b'{"text": [' + b"1," * 2_000_001 + b"1]}\n", "more than 2000000"),
    "too long": (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}\n', "is longer than"),
    "NULs": (bytes(1000) + b"\n", "not valid JSON"),
    "NUL in a text": (b'{"text": "a\0b"}\n', "not valid JSON"),
    "a control character in a text": (b'{"text": "a\x1b[31mb"}\n', "not valid JSON"),
    "Latin-1": (b'{"text": "caf\xe9"}\n', "not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16") + b"\n", "not UTF-8"),
    "half a character": (b'{"text": "\xf0\x9f\x8c"}\n', "not UTF-8"),
    "a surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}\n', "not UTF-8"),
    "an escaped surrogate": (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    "an escaped surrogate in a role": (b'{"messages": [{"role": "\\udc00"}]}\n', "unknown role"),
    "single quotes": (b"{'text': 'a'}\n", "not valid JSON"),
    "a comma too many": (b'{"text": "a",}\n', "not valid JSON"),
    "a comment": (b'// {"text": "a"}\n', "not valid JSON"),
    "CSV": (b"text,label\n", "not valid JSON"),
    "no known key": (line({"Text": "a", "\x1b[1m": "b"}), r"\(it has 'Text', '\\x1b\[1m'\)"),
    "ten thousand unknown keys": (line({str(n): n for n in range(10_000)}), "none of the known"),
    "a text that is a list": (line({"text": ["a"]}), "'text' must be a string, got list"),
    "an authority above its range": (
        line({"text": "a", "authority_weight": 1}),
        "'authority_weight' must be a number from 0 to 0.99, got 1",
    ),
    "an authority that is true": (line({"text": "a", "authority_weight": True}), "got bool"),
    "an entropy below nought": (line({"text": "a", "provenance_entropy": -1}), "got -1"),
    "an entropy that no float holds": (
        line({"text": "a", "provenance_entropy": 10**400}),
        "'provenance_entropy' must be a finite number from 0, got int",
    ),
    "a text of nothing": (line({"text": ""}), "no supervised token"),
    "a prompt alone": (line({"prompt": "a"}), "'completion' must be a string"),
    "a completion that is a number": (line({"prompt": "a", "completion": 4}), "'completion' must"),
    "messages that are a text": (line({"messages": "hi"}), "list with at least one"),
    "messages in an object": (line({"messages": {"role": "user"}}), "list with at least one"),
    "no messages": (line({"messages": []}), "list with at least one"),
    "ten thousand messages": (
        line(conversation(*["a", "b"] * 5_000)),
        "more than 2000 messages",
    ),
    "a message that is a text": (line({"messages": ["hi"]}), "message 0: must be an object"),
    "a message of null": (line({"messages": [None]}), "message 0: must be an object"),
    "an unknown role": (message(role="robot", content="b"), "message 1: unknown role 'robot'"),
    "a role of another case": (message(role="Assistant", content="b"), "unknown role 'Assistant'"),
    "a role that is a list": (message(role=["user"], content="b"), r"unknown role \['user'\]"),
    "a role that ends the turn": (
        message(role="assistant<|im_end|>", content="b"),
        "unknown role",
    ),
    "a role of many letters": (message(role="r" * 100_000, content="b"), "unknown role"),
    "no role": (message(content="b"), "unknown role None"),
    "no content": (message(role="assistant"), "'content' must be a string, got NoneType"),
    "a content that is a number": (message(role="assistant", content=3), "got int"),
    "a content of parts": (
        message(role="assistant", content=[{"type": "text", "text": "b"}]),
        "'content' must be a string, got list",
    ),
    "a content with a surrogate": (message(role="assistant", content="\ud800"), "surrogate"),
    "tool calls that are a number": (
        message(role="assistant", content=None, tool_calls=7),
        "refuses it",
    ),
    "tools in an object": (
        line({**conversation("a", "b"), "tools": {"a": 1}}),
        "'tools' must be a list",
    ),
    "tools that are numbers": (line({**conversation("a", "b"), "tools": [7]}), "refuses it"),
    "no answer": (line(conversation("a")), "no supervised token"),
    "an answer to nothing": (
        line({"messages": [{"role": "assistant", "content": "a"}]}),
        "answers nothing",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_by_file_and_line(server, tmp_path, name):
    content, says = LINES[name]
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + content)
    outcome = run_case(server, CLASS, READ, str(tmp_path), tmp_path)
    assert outcome.kind == "typed error", outcome
    assert outcome.type == "DataError"
    assert outcome.text.startswith(f"{path}:2")
    assert re.search(says, outcome.text), outcome.text
    assert len(outcome.text) < 2_000
    assert outcome.text.replace("\n", "").isprintable()


FILES = {
    "empty": (b"", "holds no rows"),
    "blank lines": (b"\n \r\n\t\n", "holds no rows"),
    "a byte-order mark alone": (b"\xef\xbb\xbf", "not valid JSON"),
    "bad lines only": (b"one\ntwo\nthree\n", r":1: is not valid JSON"),
    "lines ended as on old Macs": (b'{"text": "a"}\r{"text": "b"}\r', "Extra data"),
    "one JSON list of rows": (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', ":1: "),
    "a row over several lines": (b'{\n  "text": "a"\n}\n', ":1: "),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_rows_is_refused(server, tmp_path, name):
    content, says = FILES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    outcome = run_case(server, CLASS, READ, str(path), tmp_path)
    assert outcome.kind == "typed error", outcome
    assert "rows.jsonl" in outcome.text
    assert re.search(says, outcome.text), outcome.text


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("kind", ["link out", "pipe", "folder", "dangling link"])
def test_a_split_that_is_no_file_of_its_folder_is_refused(server, tmp_path, split, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.jsonl").write_bytes(GOOD)
    (folder / "train.jsonl").write_bytes(GOOD)
    path = folder / f"{split}.jsonl"
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("../outside.jsonl" if kind == "link out" else "nowhere.jsonl")
    outcome = run_case(server, CLASS, READ, str(folder), tmp_path)
    assert outcome.kind == "typed error", outcome
    assert path.name in outcome.text


def test_a_pipe_by_name_is_refused(server, tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    outcome = run_case(server, CLASS, READ, str(tmp_path / "rows.jsonl"), tmp_path)
    assert "not a regular file" in outcome.text


LEGAL = {
    "CRLF, a mark and blank lines": (
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
        ["a", "b"],
    ),
    "no end of line at the end": (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "an escaped NUL": (b'{"text": "a\\u0000b"}\n', ["a\0b"]),
    "separators that are no line ends": ('{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
    "an escaped pair": (b'{"text": "\\ud83c\\udf0d"}\n', ["🌍"]),
    "a long line": (b'{"text": "' + b"a" * 1_000 + b'"}\n', ["a" * 1_000]),
    "unknown fields beside a text": (b'{"text": "a", "id": 7, "meta": {"x": [null]}}\n', ["a"]),
}


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_file_is_read(server, tmp_path, name):
    content, texts = LEGAL[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    outcome = run_case(server, CLASS, READ, str(tmp_path / "rows.jsonl"), tmp_path)
    assert outcome.kind == "result", outcome
    assert outcome.value["texts"] == [f"{text}<|im_end|>" for text in texts]


TEMPLATES = {  # of a model that cannot be trusted
    "endless": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "of too many rounds": "{% for i in range(999999) %}{% endfor %}",
    "into Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "into Python by a filter": "{{ messages | attr('__class__') | attr('__mro__') }}",
    "into Python by a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "including a file": "{% include '/etc/passwd' %}",
    "importing": "{% import 'os' as os %}",
    "dividing by 0": "{{ 1 / 0 }}",
    "recursive": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "broken": "{% for m in messages %}",
    "refusing in colours": "{{ raise_exception('\x1b[31mno\x07') }}",
    "half a surrogate": "{{ messages[0].content }}{{ '\\ud800' }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_refused_or_harmless(server, tmp_path, name):
    row = conversation("a", "b")
    outcome = run_case(server, CLASS, ROW, [row, TEMPLATES[name]], tmp_path)
    assert outcome.kind == "typed error", outcome
    assert "row 1" in outcome.text
    assert outcome.text.isprintable()
    assert len(outcome.text) < 2_000
