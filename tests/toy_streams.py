"""Streams over small files, and what they give out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from tests.toy import toy_tokenizer
from workbench.data.batches import Batch
from workbench.data.stream_feed import StreamFeed
from workbench.data.streams import StreamDataset, stream_dataset


def numbered(count: int, start: int = 0, seed: int = 0) -> list[dict[str, object]]:
    """Rows of many lengths, each with its number in its text and a field that is not used."""
    lengths = np.random.default_rng([seed, start]).integers(1, 40, count).tolist()
    return [
        {"text": f"{start + row} " + "x" * length, "é": "—" * (row % 3)}
        for row, length in enumerate(lengths)
    ]


def lines_of(rows: list[dict[str, object]]) -> bytes:
    """A row a line, as UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_files(folder: Path, form: str = "plain", counts: tuple[int, ...] = (60,)) -> Path:
    """A folder of numbered rows: each file plain, gzip, or in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(counts):
        content = lines_of(numbered(count, sum(counts[:number])))
        packed = form == "gzip" or (form == "mixed" and number % 2 == 0)
        name = f"part-{number}.jsonl" + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return folder


def toy_stream(source: object, **settings: object) -> StreamDataset:
    """A stream with the tokenizer of single bytes, and a small buffer."""
    return stream_dataset(source, toy_tokenizer(), **{"buffer_rows": 13, **settings})


def toy_feed(source: object, batch_size: int = 3, accum: int = 1, **settings: object) -> StreamFeed:
    """A feed from such a stream."""
    return StreamFeed(toy_stream(source, **settings), batch_size, accum)


def texts(batches: list[Batch]) -> list[list[str]]:
    """The texts of each micro-batch."""
    decode = toy_tokenizer().decode
    rows = [[row[mask] for row, mask in zip(b.tokens, b.loss_mask)] for b in batches]
    return [[decode(row, skip_special_tokens=True) for row in batch] for batch in rows]


def one_pass(feed: StreamFeed, step: int = 0) -> tuple[list[list[Batch]], int]:
    """The steps of the pass that `step` belongs to, from it on; and the first step after it."""
    steps, epoch = [feed.batches(step)], feed.epoch(step)
    while True:
        step += 1
        batches = feed.batches(step)
        if feed.epoch(step) != epoch:
            return steps, step
        steps.append(batches)


def numbers(steps: list[list[Batch]]) -> list[int]:
    """Numbers of the rows that steps train, in their order."""
    return [int(text.split()[0]) for step in steps for batch in texts(step) for text in batch]
