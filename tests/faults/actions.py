"""What the cases do, each in a process of its own; arguments and results are JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from tests.toy import toy_base, toy_model, toy_tokenizer
from workbench.data.datasets import load_dataset
from workbench.data.examples import encode_row
from workbench.data.stream_feed import StreamFeed
from workbench.data.streams import stream_dataset
from workbench.errors import WorkbenchError
from workbench.export.adapters import load_adapter
from workbench.models.files import read_json, read_safetensors, read_weights
from workbench.models.gguf_format import GGUFFile
from workbench.models.loading import load_model, load_weights
from workbench.probes.parameters import changed, fingerprint


def digest(tensors: Mapping[str, mx.array]) -> dict[str, list]:
    """Dtype, shape and a hash of the bytes of each tensor."""
    return {
        name: [
            str(array.dtype).removeprefix("mlx.core."),
            list(array.shape),
            hashlib.sha256(bytes(memoryview(array.flatten().view(mx.uint8)))).hexdigest()[:12]
            if array.size
            else "",
        ]
        for name, array in tensors.items()
    }


def read_one(path: str) -> dict[str, list]:
    """Read one safetensors file."""
    return digest(read_safetensors(path))


def read_folder(path: str) -> dict[str, list]:
    """Read a model folder's weights."""
    return digest(read_weights(path))


def read_object(path: str) -> dict[str, object]:
    """Read a JSON object."""
    return read_json(path)


def read_gguf(path: str) -> dict[str, list]:
    """Read every tensor of a GGUF file."""
    file = GGUFFile(path)
    return {name: list(file.read(name).shape) for name in file.tensors}


def load(path: str) -> dict[str, object]:
    """Load a model and let it compute."""
    base = load_model(path, dtype=mx.float32)
    logits = base.model(mx.array([[5, 6, 7]]))
    return {"finite": mx.isfinite(logits).all().item(), "ends": sorted(base.eos_token_ids)}


def _untouched(model: nn.Module, change, *arguments: object) -> None:
    before = fingerprint(model)
    try:
        change(*arguments)
    except WorkbenchError:
        touched = changed(before, fingerprint(model))
        assert not touched, f"changed all the same: {touched}"
        raise


def fill_toy(path: str) -> dict[str, list]:
    """Fill a toy network from a file; a refusal must leave it as it was."""
    model = toy_model(seed=1)
    _untouched(model, load_weights, model, path)
    return {}


def attach_adapter(folder: str) -> int:
    """Attach an adapter to a toy; a refusal must leave it as it was."""
    base = toy_base()
    before = [path for path, _ in base.model.named_modules()]
    try:
        _untouched(base.model, load_adapter, base, folder)
    except WorkbenchError:
        assert [path for path, _ in base.model.named_modules()] == before
        raise
    return len([path for path, _ in base.model.named_modules() if path.endswith(".linear")])


def tokenise_data(source: str) -> dict[str, object]:
    """Load a data set with the toy tokenizer."""
    data = load_dataset(source, toy_tokenizer(), valid_fraction=0)
    texts = [toy_tokenizer().decode(example.tokens.tolist()) for example in data.train]
    return {"texts": texts, "shown": data._repr_html_()}


def stream_data(source: str) -> dict[str, object]:
    """Stream one pass with the toy tokenizer."""
    data = stream_dataset(source, toy_tokenizer(), buffer_rows=4)
    feed, step, texts = StreamFeed(data, 1), 0, []
    batches = feed.batches(step)
    while feed.epoch(step) == 1:
        tokens = [row.tolist() for batch in batches for row in batch.tokens]
        texts += map(toy_tokenizer().decode, tokens)
        step += 1
        batches = feed.batches(step)
    return {
        "texts": sorted(texts),
        "bad": [[line.line, line.reason] for line in feed.bad_lines],
        "num_bad": feed.num_bad,
        "shown": data._repr_html_() + str(feed),
    }


def tokenise_row(argument: list) -> list[int]:
    """Tokenise a row with a chat template of its own."""
    row, template = argument
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return encode_row(row, tokenizer, where="row 1").tokens.tolist()
