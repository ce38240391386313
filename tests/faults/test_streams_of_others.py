"""Hostile streams: each bad line is counted by its number, the rest is read; packed ones, too."""

import gzip
import random
import re

import pytest

from tests.faults.cases import run_case
from tests.faults.test_data_sets import GOOD, LEGAL, LINES

CLASS = "streams"
STREAM = "tests.faults.actions:stream_data"
SHORT = [name for name, (content, _) in LINES.items() if len(content) < 1_000_000]


def stream(server, tmp_path, content, packed):
    """The outcome of one pass over a file of this content."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    return run_case(server, CLASS, STREAM, str(path), tmp_path)


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_counted_and_the_rest_is_read(server, tmp_path, name):
    content, says = LINES[name]
    packed = list(LINES).index(name) % 2 == 1
    outcome = stream(server, tmp_path, GOOD + content, packed)
    assert outcome.kind == "result", outcome
    assert outcome.value["texts"] == ["fine<|im_end|>"]
    assert outcome.value["num_bad"] == 1
    ((number, reason),) = outcome.value["bad"]
    assert number == 2
    assert re.search(says, reason), reason
    assert reason.isprintable()
    assert len(reason) <= 200


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_file_is_streamed(server, tmp_path, name):
    content, texts = LEGAL[name]
    outcome = stream(server, tmp_path, content, packed=True)
    assert outcome.value["texts"] == sorted(f"{text}<|im_end|>" for text in texts)
    assert outcome.value["num_bad"] == 0


def test_many_bad_lines_are_refused_by_name(server, tmp_path):
    content = GOOD + b"".join(LINES[name][0].rstrip() + b"\n" for name in SHORT) * 3
    outcome = stream(server, tmp_path, content, packed=False)
    assert outcome.type == "DataError"
    assert "more than 100 lines cannot be trained on" in outcome.text
    assert outcome.text.count("/rows.jsonl:") == 20
    assert outcome.text.replace("\n", "").isprintable()
    assert len(outcome.text) < 20 * 600


@pytest.mark.parametrize("seed", range(12))
def test_a_spoilt_gzip_file_is_refused_by_file_and_line(server, tmp_path, seed):
    chance = random.Random(seed)
    letters = ["".join(chance.choices("abcdefgh", k=80)) for _ in range(300)]
    content = bytearray(gzip.compress("".join(f'{{"text": "{t}"}}\n' for t in letters).encode()))
    place = chance.randrange(10, len(content) - 8)
    if seed % 3 == 0:
        del content[place:]
    elif seed % 3 == 1:
        content[place] ^= 1 << chance.randrange(8)
    else:
        del content[place]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    outcome = run_case(server, CLASS, STREAM, str(path), tmp_path)
    assert outcome.kind == "typed error", outcome
    damaged = re.match(rf"{path}:\d+: the gzip file is damaged or cut short", outcome.text)
    # What is unpacked before its sum is known may be lines, but no rows.
    assert damaged or (seed % 3 and re.search(rf"more than 100 .*\n  {path}:\d+: ", outcome.text))


def test_a_line_that_unpacks_to_a_hundred_megabytes_is_passed_over(server, tmp_path):
    outcome = stream(server, tmp_path, GOOD + b"x" * 100_000_000 + b"\n" + GOOD, packed=True)
    assert outcome.value["texts"] == ["fine<|im_end|>"] * 2
    assert outcome.value["bad"] == [[2, "is longer than 16000000 bytes"]]
