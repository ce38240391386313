"""Files of another kind under our names: said to be what they are not, and never run."""

import gzip
import io
import json
import pickle
import shutil
import sqlite3
import zipfile

import numpy as np
import pytest

from tests.faults.cases import run_case

CLASS = "foreign files under our names"
ACTIONS = "tests.faults.actions:"


class Runs:
    """A pickle that leaves a mark where it is run."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.ones((259, 32), np.float32))
    return buffer.getvalue()


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(3))
    return buffer.getvalue()


def zip_with(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x" * 100)
    return buffer.getvalue()


def database():
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table t (a)")
        return connection.serialize()


FOREIGN = {
    "pickle": lambda mark: pickle.dumps(Runs(mark)),
    "pickle of protocol 0": lambda mark: pickle.dumps(Runs(mark), protocol=0),
    "torch zip": lambda mark: zip_with("archive/data.pkl"),
    "zip that leads out": lambda mark: zip_with("../../evil.txt"),
    "npy": lambda mark: npy(),
    "npz": lambda mark: npz(),
    "HTML page": lambda mark: b"<!DOCTYPE html><html><body>404: not found</body></html>\n",
    "git-lfs pointer": lambda mark: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        + b"4d" * 32
        + b"\nsize 98362432\n"
    ),
    "gzip": lambda mark: gzip.compress(b"{}" * 100, mtime=0),
    "PNG": lambda mark: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "HDF5": lambda mark: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "SQLite": lambda mark: database(),
    "shell script": lambda mark: f"#!/bin/sh\ntouch {mark}\n".encode(),
    "Python": lambda mark: f"open({str(mark)!r}, 'w')\n".encode(),
    "YAML that makes objects": lambda mark: b"!!python/object/apply:os.system ['touch mark']\n",
    "empty": lambda mark: b"",
    "zeros": lambda mark: bytes(4096),
    "ones": lambda mark: b"\xff" * 4096,
    "UTF-16": lambda mark: json.dumps({"a": 1}).encode("utf-16"),
}
NAMES = {  # a file of ours: the action that reads it
    "model/model.safetensors": "load",
    "model/model.safetensors.index.json": "load",
    "model/config.json": "load",
    "model/generation_config.json": "load",
    "model/tokenizer.json": "load",
    "model/tokenizer_config.json": "load",
    "x.gguf": "load",
    "adapter/adapters.safetensors": "attach_adapter",
    "adapter/adapter_config.json": "attach_adapter",
    "data/train.jsonl": "tokenise_data",
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_file_is_refused_and_not_run(server, tmp_path, saved, name, kind):
    folder = shutil.copytree(saved, tmp_path / "all")
    mark = folder / "mark"
    path = folder / name
    path.write_bytes(FOREIGN[kind](mark))
    target = path if name == "x.gguf" else path.parent
    outcome = run_case(server, CLASS, ACTIONS + NAMES[name], str(target), folder)
    assert outcome.kind == "typed error", outcome
    assert target.name in outcome.text
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "consolidated.pth"])
def test_pickled_weights_alone_are_refused_with_the_cure(server, tmp_path, saved, name):
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(FOREIGN["pickle"](folder / "mark"))
    outcome = run_case(server, CLASS, "tests.faults.actions:load", str(folder), folder)
    assert outcome.kind == "typed error"
    assert "Pickled weights" in outcome.text


def test_an_executable_model_file_beside_a_whole_model_is_not_run(server, tmp_path, saved):
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    for name in ("modeling_toy.py", "tokenization_toy.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(f"open({str(folder / 'mark')!r}, 'w')\n")
    outcome = run_case(server, CLASS, "tests.faults.actions:load", str(folder), folder)
    assert outcome.kind == "result", outcome
