"""Damage by chance: many copies in one process, each refused or read as it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from tests.faults import actions
from tests.faults.actions import digest
from tests.toy_folders import equal_bits, weights_of
from workbench.errors import WorkbenchError
from workbench.models.files import read_safetensors
from workbench.models.gguf_format import GGUFFile
from workbench.models.loading import load_model


def damaged(content: bytes, header: int, chance: random.Random, number: int) -> bytes:
    """A third are cut off anywhere; the others have one to four bits of the header turned."""
    if number % 3 == 0:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        changed[chance.randrange(header)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _run(argument: list, judge: Callable[[Path, bytes], object]) -> dict[str, object]:
    path, seed, count, header = argument
    path, chance, refused, told = Path(path), random.Random(seed), 0, []
    content = path.read_bytes()
    for number in range(count):
        path.write_bytes(copy := damaged(content, header, chance, number))
        try:
            told.append(judge(path, copy))
        except WorkbenchError:
            refused += 1
    path.write_bytes(content)
    return {"refused": refused, "read": told}


def safetensors(argument: list) -> dict[str, object]:
    """What was read of damaged copies: the header, and a digest of the tensors."""
    header = argument[-1]

    def judge(path: Path, copy: bytes) -> list[object]:
        tensors = digest(read_safetensors(path))
        return [copy[8:header].decode(), tensors]

    return _run(argument, judge)


def gguf(argument: list) -> dict[str, object]:
    """Damaged copies that are read: what the gguf package reads differently of them."""

    def judge(path: Path, copy: bytes) -> list[str]:
        ours, theirs = GGUFFile(path), GGUFReader(path)
        wrong = [] if list(ours.tensors) == [t.name for t in theirs.tensors] else ["names"]
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            raw = np.asarray(tensor.data).view(np.uint8).tobytes()
            same = list(mine.shape) == list(reversed(tensor.shape.tolist()))
            if not same or copy[mine.start : mine.start + mine.size] != raw:
                wrong.append(tensor.name)
        for key, value in ours.metadata.items():
            if not _same(value, theirs.get_field(key).contents()):
                wrong.append(key)
        return wrong

    return _run(argument, judge)


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and one != one:
        return other != other
    return one == other


def gguf_models(argument: list) -> dict[str, object]:
    """Damaged copies that load as a model: whether their weights differ from the whole one's."""
    whole = weights_of(load_model(argument[0]).model)
    return _run(argument, lambda path, copy: equal_bits(weights_of(load_model(path).model), whole))


HOSTILE = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf")),
    *(
        float("nan"),
        "",
        "x",
        "\0",
        "../x",
        "x" * 10_000,
        [],
        {},
        [[]],
        {"": {}},
        [None],
        ["x"] * 50,
    ),
)


def json_files(argument: list) -> list[str]:
    """Put hostile values into a JSON file of a folder, one after the other, and read the folder.

    Args:
        argument: the file, the action that reads its folder, a seed, and a count.

    Returns:
        What ended otherwise than by a typed error or a result.
    """
    path, action, seed, count = Path(argument[0]), *argument[1:]
    chance, content, strange = random.Random(seed), path.read_text(encoding="utf-8"), []
    for _ in range(count):
        changed = json.loads(content)
        where = _spoil(changed, chance)
        path.write_text(json.dumps(changed), encoding="utf-8")
        try:
            getattr(actions, action)(str(path.parent))
        except WorkbenchError as error:
            if len(str(error)) > 3_000 or path.parent.name not in str(error):
                strange.append(f"{where}: {str(error)[:200]}")
        except BaseException as error:
            strange.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
    path.write_text(content, encoding="utf-8")
    return strange


def _spoil(tree: dict | list, chance: random.Random) -> str:
    """Replace, drop or wrap one value somewhere in the tree; says where."""
    place, key = [], ""
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = chance.choice(list(keys))
        place.append(str(key))
        inner = tree[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.2:
            break
        tree = inner
    how = chance.choice(("replace", "replace", "replace", "drop", "wrap"))
    if how == "drop" and isinstance(tree, dict):
        del tree[key]
        return f"{'.'.join(place)} dropped"
    tree[key] = [tree[key]] if how == "wrap" else chance.choice(HOSTILE)
    return f"{'.'.join(place)} = {str(tree[key])[:60]}"
