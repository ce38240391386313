"""Streams: every row once a pass, an order of their own, a place that can be saved."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import tracemalloc

import numpy as np
import psutil
import pytest

from tests.toy import conversation, write_jsonl
from tests.toy_streams import (
    lines_of,
    numbered,
    numbers,
    one_pass,
    texts,
    toy_feed,
    toy_stream,
    write_files,
)
from workbench.data import rows, stream_files, stream_reader
from workbench.data.datasets import load_dataset
from workbench.data.stream_feed import StreamFeed
from workbench.errors import ConfigError, DataError

FORMS = {"plain": (60,), "gzip": (60,), "mixed": (25, 0, 14, 21)}


@pytest.mark.parametrize("buffer_rows", [1, 13, 1000])
@pytest.mark.parametrize(("batch_size", "accum"), [(1, 1), (3, 1), (4, 3), (64, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_every_row_is_used_once_a_pass(form, batch_size, accum, buffer_rows, tmp_path):
    folder = write_files(tmp_path, form, FORMS[form])
    feed, step = toy_feed(folder, batch_size, accum, buffer_rows=buffer_rows), 0
    orders = []
    for _ in range(3):
        steps, step = one_pass(feed, step)
        sizes = [len(batch.tokens) for batches in steps for batch in batches]
        assert sum(size < batch_size for size in sizes) <= 1
        assert all(len(batches) == accum for batches in steps[:-1])
        orders.append(numbers(steps))
        assert sorted(orders[-1]) == list(range(60))
    assert len(set(map(tuple, orders))) == 3 or batch_size == 64  # which is all of them


def test_the_order_is_a_function_of_the_seed(tmp_path):
    folder = write_files(tmp_path, "mixed", FORMS["mixed"])
    one, same, other = (numbers(one_pass(toy_feed(folder, seed=s))[0]) for s in (7, 7, 8))
    assert one == same != other


def test_the_files_are_read_in_another_order_by_each_pass_and_seed(tmp_path):
    write_files(tmp_path, counts=(40,) * 6)  # more rows than are sorted by length together
    orders = {}
    for seed in range(3):
        feed, step = toy_feed(tmp_path, batch_size=1, buffer_rows=1, seed=seed), 0
        for epoch in range(3):
            steps, step = one_pass(feed, step)
            rows = np.array(numbers(steps)) // 40
            ranks = [float(np.flatnonzero(rows == file).mean()) for file in range(6)]
            orders[seed, epoch] = tuple(np.argsort(ranks).tolist())
    assert len(set(orders.values())) == len(orders) == 9
    assert tuple(range(6)) not in orders.values()


def test_rows_are_those_of_a_data_set(tmp_path, tokenizer):
    chats = [conversation(f"question {n}", f"answer {n} <|im_end|>") for n in range(9)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats, {"text": "é" * 50}, *numbered(5)])
    settings = {"max_length": 60, "train_on": "last", "allow_special_tokens": True}
    data = load_dataset(path, tokenizer, valid_fraction=0, **settings)
    feed = toy_feed(path, batch_size=1, **settings)
    for batch in itertools.chain.from_iterable(feed.batches(step) for step in range(15)):
        (expected,) = [example for example in data.train if example.where == batch.places[0]]
        assert np.array_equal(batch.tokens[0], expected.tokens)
        assert np.array_equal(batch.loss_mask[0], expected.loss_mask)
    assert feed.truncated == data.truncated == 1


def test_no_row_comes_before_it_is_read(tmp_path):
    feed = toy_feed(write_files(tmp_path, counts=(400,)), batch_size=1, buffer_rows=20)
    order = numbers(one_pass(feed)[0])
    window = 32
    assert all(row < 20 + (place // window + 1) * window for place, row in enumerate(order))
    away = np.abs(np.array(order) - np.arange(400))
    assert away.mean() > 10  # in the order of the file it would be 0


def test_the_buffer_is_bounded_in_rows_and_bytes(tmp_path, monkeypatch):
    folder = write_files(tmp_path, counts=(400,))
    feed = toy_feed(folder, buffer_rows=50)
    feed.batches(0)
    assert len(feed.state(0)["buffer"][0]) <= 50
    monkeypatch.setattr(stream_reader, "BUFFER_BYTES", 700)
    feed = toy_feed(folder, buffer_rows=50)
    feed.batches(0)
    held = [row.text for row in feed._reader.position.buffer]
    assert 0 < sum(map(len, held)) <= 700 + max(map(len, held))
    assert sorted(numbers(one_pass(feed)[0])) == list(range(400))


def test_rows_of_a_micro_batch_have_nearly_one_length(tmp_path):
    lengths = np.random.default_rng(1).integers(30, 61, 512).tolist()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * length} for length in lengths])
    batches = list(itertools.chain.from_iterable(one_pass(toy_feed(path, batch_size=8))[0]))
    used = sum(batch.num_tokens + len(batch.tokens) for batch in batches)
    assert used == sum(lengths) + 512  # each with the token that ends it
    assert 1 - used / sum(batch.tokens.size for batch in batches) <= 0.08
    longest = [batch.tokens.shape[1] for batch in batches]
    assert longest != sorted(longest)


@pytest.mark.parametrize("form", FORMS)
def test_a_restored_feed_goes_on_as_if_it_had_not_stopped(form, tmp_path):
    folder, settings = write_files(tmp_path, form, FORMS[form]), {"batch_size": 1, "accum": 2}
    whole, left = toy_feed(folder, **settings), toy_feed(folder, **settings)
    expected = [(texts(whole.batches(step)), whole.epoch(step)) for step in range(75)]
    shares = []
    for step in range(75):
        if step % 4 == 3:  # after a step was made, or asked for and not made
            left.batches(step)
        state = json.loads(json.dumps(left.state(step)))
        left = toy_feed(folder, **settings)
        left.restore(state, step)
        assert (texts(left.batches(step)), left.epoch(step)) == expected[step]
        shares.append(left.progress)
    again = toy_feed(folder, **settings)
    assert shares == [(again.batches(step), again.progress)[1] for step in range(75)]


def test_a_place_is_numbers_and_no_text(tmp_path):
    secret = "the text of a row"
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{secret} {n}"} for n in range(90)])
    feed = toy_feed(path, buffer_rows=40)
    feed.batches(0)
    state = json.dumps(feed.state(1))
    assert secret not in state
    assert len(state) < 60 * (40 + 32 * 3) + 1000


@pytest.mark.parametrize("form", FORMS)
def test_progress_runs_from_0_to_1_in_every_pass(form, tmp_path):
    feed, shares, step = toy_feed(write_files(tmp_path, form, FORMS[form]), batch_size=1), [], 0
    assert feed.progress == 0
    for _ in range(2):
        shares = []
        for _ in range(60):
            feed.batches(step)
            shares.append(feed.progress)
            step += 1
        assert 0 < shares[0] < 0.1 or form != "plain"
        assert shares[-1] == pytest.approx(1, abs=1e-12)
        assert max(shares) <= 1
        assert shares == sorted(shares) or form != "plain"
    assert str(feed).startswith("pass 2, 100%: 60 rows used; 0 bad lines skipped")


BAD = {
    b"{'text': 'a'}": "is not valid JSON",
    b'["text"]': "must be a JSON object, got list",
    b'{"Text": "a"}': "has none of the known keys",
    b'{"text": "caf\xe9"}': "is not UTF-8 (byte 13 of the line)",
    b'{"text": ""}': "no supervised token",
    b'{"messages": [{"role": "robot", "content": "a"}]}': "message 0: unknown role 'robot'",
    b'{"text": "' + b"x" * 2000 + b'"}': "is longer than 1000 bytes",
}


@pytest.fixture
def short_lines(monkeypatch):
    """Lines of 1000 bytes are the longest."""
    for module in (rows, stream_files, stream_reader):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)


@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines_are_skipped_counted_and_named(packed, tmp_path, short_lines):
    good = lines_of(numbered(40)).splitlines()
    lines = [*good[:20], *(line for bad in BAD for line in (bad, b"  ")), *good[20:]]
    path = tmp_path / "rows.jsonl"
    content = b"\r\n".join(lines)
    path.write_bytes(gzip.compress(content) if packed else content)
    feed = toy_feed(path, max_bad_lines=len(BAD))
    first, step = one_pass(feed)
    assert sorted(numbers(first)) == list(range(40))
    for _ in range(2):
        assert feed.num_bad == len(BAD)
        assert [(line.path, line.line) for line in feed.bad_lines] == [
            (str(path), number) for number in range(21, 21 + 2 * len(BAD), 2)
        ]
        for line, reason in zip(feed.bad_lines, BAD.values()):
            assert reason in line.reason
        again, step = one_pass(feed, step)  # which does not count them again
        assert sorted(numbers(again)) == list(range(40))


def test_more_bad_lines_than_allowed_raise_and_name_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines_of(numbered(5)) + b"one\ntwo\nthree\n" + lines_of(numbered(90, 5)))
    feed = toy_feed(path, max_bad_lines=2)
    for _ in range(2):  # asked again, it is the same
        with pytest.raises(DataError, match="more than 2 lines cannot") as caught:
            one_pass(feed)
        assert all(f"{path}:{line}: is not valid JSON" in str(caught.value) for line in (6, 7, 8))
        assert "raise max_bad_lines" in str(caught.value)
    allowed = toy_feed(path, max_bad_lines=3)
    allowed.restore(feed.state(0), 0)
    assert numbers(one_pass(allowed)[0]) == numbers(one_pass(toy_feed(path, max_bad_lines=3))[0])


def test_only_the_first_bad_lines_are_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines_of(numbered(3)) + b"no\n" * 50)
    feed = toy_feed(path)
    one_pass(feed)
    assert (feed.num_bad, len(feed.bad_lines)) == (50, stream_reader.KEPT_BAD_LINES)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"no\nno\n"])
def test_nothing_to_train_on_raises(content, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="holds no row that can be trained on"):
        toy_feed(tmp_path).batches(0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_line_is_never_held(packed, tmp_path, short_lines):
    long = b'{"text": "' + b"x" * 30_000_000 + b'"}\n'
    content = lines_of(numbered(3)) + long + lines_of(numbered(4, 3))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    del content, long
    feed = toy_feed(path, batch_size=1)
    tracemalloc.start()
    steps, _ = one_pass(feed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(numbers(steps)) == list(range(7))
    assert feed.bad_lines[0].line == 4
    assert peak < 5_000_000


def test_members_of_one_gzip_file_follow_one_another(tmp_path):
    halves = [gzip.compress(lines_of(numbered(20, start))) for start in (0, 20)]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(halves))  # the name does not say that it is gzip
    assert sorted(numbers(one_pass(toy_feed(tmp_path))[0])) == list(range(40))


def test_a_gzip_file_that_is_cut_short_or_damaged_is_named_with_its_line(tmp_path):
    letters = random.Random(0)
    lines = [
        json.dumps({"text": "".join(letters.choices("abcdefgh ", k=200))}).encode() + b"\n"
        for _ in range(500)
    ]
    whole, path = gzip.compress(b"".join(lines)), tmp_path / "rows.jsonl.gz"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    spoilt = {"cut": whole[: len(whole) // 2], "no end": whole[:-8], "flipped": bytes(flipped)}
    for name, content in spoilt.items():
        path.write_bytes(content)
        feed = toy_feed(path, buffer_rows=1000, max_bad_lines=0)
        for _ in range(2):
            with pytest.raises(DataError, match=r"gzip file is damaged or cut short") as caught:
                feed.batches(0)
            line = int(caught.value.where.removeprefix(f"{path}:"))
            assert 150 < line <= 501, name


def test_an_interrupt_while_rows_are_drawn_loses_none(tmp_path, monkeypatch):
    folder = write_files(tmp_path, "mixed", FORMS["mixed"])
    expected = numbers(one_pass(toy_feed(folder, 1))[0])
    parse, calls = stream_reader.parse_row, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) in (5, 50):
            raise KeyboardInterrupt
        return parse(*arguments)

    monkeypatch.setattr(stream_reader, "parse_row", interrupted)
    feed, found = toy_feed(folder, 1), []
    for step in range(60):
        try:
            found.append(feed.batches(step))
        except KeyboardInterrupt:
            found.append(feed.batches(step))
    assert next(calls) > 60 + 5 + 13  # two windows were begun again
    assert numbers(found) == expected


def test_a_mark_brings_the_same_batches_back(tmp_path):
    feed = toy_feed(write_files(tmp_path, "gzip"))
    feed.batches(0)
    mark = feed.mark()
    first = numbers([feed.batches(step) for step in range(1, 30)])
    feed.go_back(mark)
    assert numbers([feed.batches(step) for step in range(1, 30)]) == first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("buffer_rows", 0),
        ("buffer_rows", 250_001),
        ("buffer_rows", True),
        ("seed", -1),
        ("max_length", 1),
        ("max_bad_lines", 1.5),
        ("train_on", "user"),
    ],
)
def test_a_setting_out_of_range_is_named(name, value, tmp_path):
    with pytest.raises(ConfigError, match=name):
        toy_stream(write_files(tmp_path), **{name: value})


def test_the_description_says_what_is_streamed(tmp_path):
    folder = write_files(tmp_path / "corpus", "mixed", FORMS["mixed"])
    data = toy_stream(folder, valid=[{"text": "a"}, {"text": "b"}])
    assert str(data) == (
        "corpus: stream of 4 files (2 gzip), 0.0 MB; shuffled among 13 rows; valid 2 rows"
    )
    assert data.train == []
    with pytest.raises(DataError, match=r"^row 1: 'text' must be a string"):
        toy_stream(folder, valid=[{"text": "a"}, {"text": 3}])


def test_a_source_with_a_split_for_validation_validates_by_that(tmp_path):
    folder = write_files(tmp_path / "corpus", counts=(3,))
    (folder / "part-0.jsonl").rename(folder / "train.jsonl")
    (folder / "valid.jsonl").write_bytes(lines_of(numbered(2, 100)))
    for valid in (folder, {"train": numbered(3), "validation": numbered(2, 100)}):
        data = toy_stream(folder, valid=valid)
        assert [len(row) for row in data.valid] == [
            len(row) for row in toy_stream(folder, valid=numbered(2, 100)).valid
        ]


def test_rows_that_train_do_not_validate_as_well(tmp_path):
    folder = write_files(tmp_path / "corpus", counts=(3,))
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    (folder / "part-0.jsonl").rename(train)
    with pytest.raises(DataError, match=r"train\.jsonl: would be trained on and validate"):
        toy_stream(folder, valid=folder)  # which has no other rows
    valid.write_bytes(lines_of(numbered(2, 100)))
    os.symlink(valid, tmp_path / "other name.jsonl")
    for source in (f"{folder}/*.jsonl", [train, valid]):
        for held in (valid, folder, tmp_path / "other name.jsonl"):
            with pytest.raises(DataError, match=r"valid\.jsonl: would be trained on and validate"):
                toy_stream(source, valid=held)
    assert len(toy_stream(f"{folder}/t*.jsonl", valid=valid).valid) == 2


def test_feeds_of_one_stream_do_not_disturb_each_other(tmp_path):
    data = toy_stream(write_files(tmp_path))
    one, other = StreamFeed(data, 3), StreamFeed(data, 3)
    first = [numbers([one.batches(step)]) for step in range(10)]
    assert [numbers([other.batches(step)]) for step in range(10)] == first


@pytest.mark.long
def test_memory_stays_flat_over_300_megabytes(tmp_path):
    path, meta = tmp_path / "rows.jsonl", "m" * 2000
    with path.open("w") as file:
        file.writelines(f'{{"text": "{n}", "meta": "{meta}"}}\n' for n in range(150_000))
    feed, step = toy_feed(path, batch_size=8, buffer_rows=1000), 0
    readings = [psutil.Process().memory_info().rss]
    feed.batches(step)
    while feed.epoch(step) == 1:
        if step % 1000 == 0:
            readings.append(psutil.Process().memory_info().rss)
        step += 1
        feed.batches(step)
    assert step == 150_000 // 8
    assert max(readings) - readings[0] < 40_000_000
