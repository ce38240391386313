"""Tokenizers that lie or would panic: refused by name, and no code of a folder is run."""

import json
import os
import shutil

import pytest

from tests.faults.cases import run_case
from tests.faults.test_adapters_and_configs import CLASS, LOAD, refuse
from tests.toy import CHAT_TEMPLATE


def precompiled_map(tokenizer):
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def template_of_nothing(tokenizer):
    piece = {"SpecialToken": {"id": "[gone]", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [piece], "pair": [], "special_tokens": {}}
    tokenizer["post_processor"] = processor


def broken_pattern(tokenizer):
    split = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = split


def unknown_model(tokenizer):
    tokenizer["model"]["type"] = "Oracle"


def huge_id(tokenizer):
    tokenizer["model"]["vocab"]["zzz"] = 2**32 - 2


def negative_id(tokenizer):
    tokenizer["model"]["vocab"]["zzz"] = -1


def foreign_merge(tokenizer):
    tokenizer["model"]["merges"] = [["not", "there"]]


TOKENIZERS = {
    precompiled_map: "no readable tokenizer",
    template_of_nothing: "no readable tokenizer",
    broken_pattern: "no readable tokenizer",
    unknown_model: "no readable tokenizer",
    huge_id: "makes token ids up to 4294967294",
    negative_id: "no readable tokenizer",
    foreign_merge: "no readable tokenizer",
}


@pytest.mark.parametrize("spoil", TOKENIZERS, ids=lambda spoil: spoil.__name__)
def test_a_tokenizer_that_would_panic_is_refused(server, model, spoil):
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    refuse(server, LOAD, model, "model", TOKENIZERS[spoil])


TOKENIZER_FILES = {
    "tokenizer.json nested": ("tokenizer.json", "[" * 100_000, "no readable tokenizer"),
    "tokenizer.json empty": ("tokenizer.json", "", "no readable tokenizer"),
    "config nested": ("tokenizer_config.json", '{"a":' * 5000, "nested deeper"),
    "config with a key twice": ("tokenizer_config.json", '{"a": 1, "a": 2}', "'a' twice"),
    "config with code": (
        "tokenizer_config.json",
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}),
        "no readable tokenizer",
    ),
    "a template that is a number": (
        "tokenizer_config.json",
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": 7}),
        "no readable tokenizer",
    ),
    "generation end tokens": ("generation_config.json", '{"eos_token_id": {"a": 1}}', "eos_token"),
}


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_tokenizers_file_that_lies_is_refused(server, model, name):
    file, content, says = TOKENIZER_FILES[name]
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / file).write_text(content)
    (model / "evil.py").write_text("open('ran', 'w').close()\nraise SystemExit('ran')")
    refuse(server, LOAD, model, "model", says)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "config.json", "notes.txt"]
)
def test_a_pipe_or_link_among_a_models_files_is_refused(server, model, name):
    (model.parent / "outside").write_text(CHAT_TEMPLATE)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../outside")
    refuse(server, LOAD, model, name, "leads out of its folder")
    (model / name).unlink()
    os.mkfifo(model / name)
    refuse(server, LOAD, model, name, "not a regular file")


CLASSES = ["LlamaTokenizer", "T5Tokenizer", "GPT2Tokenizer", "BertTokenizer", "Qwen2Tokenizer"]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("content", [None, b"", bytes(1000), b"\x0a\xff\xff\xff\xff\x0f" * 99])
def test_a_vocabulary_that_is_missing_or_damaged_is_refused(server, model, kind, content):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    if content is not None:
        for name in ("tokenizer.model", "spiece.model", "vocab.txt"):
            (model / name).write_bytes(content)
    refuse(server, LOAD, model, "model", "no readable tokenizer")


FUZZED = {  # a file: the action that reads its folder
    "model/config.json": "load",
    "model/tokenizer_config.json": "load",
    "model/tokenizer.json": "load",
    "adapter/adapter_config.json": "attach_adapter",
}


@pytest.mark.parametrize("name", FUZZED)
def test_hostile_values_by_chance_end_in_typed_errors_or_results(server, tmp_path, saved, name):
    folder = shutil.copytree(saved, tmp_path / "all")
    argument = [str(folder / name), FUZZED[name], 11, 40]
    outcome = run_case(server, CLASS, "tests.faults.fuzz:json_files", argument, folder)
    assert outcome.value == [], outcome
