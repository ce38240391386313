"""Malformed safetensors: each is refused by name, before MLX sees it; what is legal is read."""

import json
import re
import struct
import time

import numpy as np
import pytest
from safetensors import safe_open

from tests.faults.cases import run_case
from tests.faults.safetensors_bytes import DATA, HEADER, MALFORMED, VALID, entry, pack, with_entry
from workbench.models.safetensors_header import read_header

CLASS = "malformed safetensors"
READ = "tests.faults.actions:read_one"
READ_FOLDER = "tests.faults.actions:read_folder"
FILL = "tests.faults.actions:fill_toy"


def refuse(server, folder, says, action=READ, name="model.safetensors", target=None):
    """Run a case that must be refused: the file is named, and what is wrong with it."""
    outcome = run_case(server, CLASS, action, str(target or folder / name), folder)
    assert outcome.kind == "typed error", outcome
    assert name in outcome.text
    assert re.search(says, outcome.text), outcome.text


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_by_name(server, tmp_path, name):
    content, says = MALFORMED[name]
    assert content != VALID
    (tmp_path / "model.safetensors").write_bytes(content)
    refuse(server, tmp_path, says)


# What is legal is read


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


LEGAL = {
    "the valid file": (VALID, ["weight", "half", "bytes", "scalar"]),
    "spaces as padding": (pack(json.dumps(HEADER) + "  " * 7), ["weight"]),
    "no tensors": (pack({}, b""), []),
    "null for metadata": (pack({"a": entry("U8", [1], 0, 1), "__metadata__": None}, b"x"), ["a"]),
    "an empty tensor": (pack({"a": entry("F32", [0, 5], 0, 0)}, b""), ["a"]),
    "empty tensors between others": (
        pack(
            {"a": entry("U8", [1], 0, 1), "b": entry("U8", [0], 1, 1), "c": entry("U8", [1], 1, 2)},
            b"xy",
        ),
        ["a", "b", "c"],
    ),
    "numbers off their alignment": (
        pack({"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}, b"x" + floats(1, 2)),
        ["a", "b"],
    ),
    "entries in another order": (pack(dict(reversed(HEADER.items()))), ["weight"]),
    "an escaped name": (pack(json.dumps(HEADER).replace("weight", "w\\u0065ight")), ["weight"]),
    "a name of other letters": (pack({"größe 重み": entry("U8", [1], 0, 1)}, b"x"), ["größe 重み"]),
    "32 dimensions": (pack({"a": entry("U8", [1] * 32, 0, 1)}, b"x"), ["a"]),
}


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_file_is_read(server, tmp_path, name):
    content, names = LEGAL[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    outcome = run_case(server, CLASS, READ, str(path), tmp_path)
    assert outcome.kind == "result", outcome
    assert set(names) <= set(outcome.value)
    with safe_open(path, framework="numpy") as reference:
        assert set(outcome.value) == set(reference.keys())
        shapes = {name: reference.get_slice(name).get_shape() for name in reference.keys()}  # noqa: SIM118
    assert {name: fields[1] for name, fields in outcome.value.items()} == shapes


# Chance


def test_chance_damage_is_refused_or_means_what_the_reference_reads(server, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(VALID)
    argument = [str(path), 5, 450, len(VALID) - len(DATA)]
    outcome = run_case(server, CLASS, "tests.faults.fuzz:safetensors", argument, tmp_path)
    assert outcome.kind == "result", outcome
    assert outcome.value["refused"] > 300
    # What was accepted is legal: another name, or another letter of the metadata.
    for text, tensors in outcome.value["read"]:
        header = json.loads(text)
        header.pop("__metadata__", None)
        assert header.keys() == tensors.keys()
        places = [list(fields.values()) for fields in header.values()]
        assert places == [list(HEADER[name].values()) for name in HEADER if name[0] != "_"], text


# Cost


def test_the_header_of_half_a_gigabyte_is_checked_at_once(tmp_path):
    rows, names = 200_000, [f"model.layers.{number}.weight" for number in range(600)]
    header = {
        name: entry("F32", [rows], at * 4 * rows, (at + 1) * 4 * rows)
        for at, name in enumerate(names)
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 4 * rows * len(names))  # a hole: no disk is used
    start = time.perf_counter()
    assert len(read_header(path)) == len(names)
    assert time.perf_counter() - start < 1


def test_values_are_those_of_the_reference(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(VALID)
    header = read_header(path)
    with safe_open(path, framework="numpy") as reference:
        for name, fields in header.items():
            ours = np.frombuffer(DATA[fields.start : fields.end], np.uint8)
            assert np.array_equal(reference.get_tensor(name).reshape(-1).view(np.uint8), ours)


def test_the_valid_file_is_what_the_malformed_ones_are_made_from(tmp_path):
    assert with_entry("weight") == VALID
