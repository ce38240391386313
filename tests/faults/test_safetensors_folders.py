"""Safetensors in a folder: places, links, shards, and whole files of another network."""

import json
import os

import mlx.core as mx
import pytest

from tests.faults.cases import run_case
from tests.faults.safetensors_bytes import HEADER, VALID
from tests.faults.test_safetensors import CLASS, READ, refuse
from tests.toy import toy_model
from tests.toy_folders import weights_of
from workbench.models.files import INDEX_NAME, write_safetensors

READ_FOLDER = "tests.faults.actions:read_folder"
FILL = "tests.faults.actions:fill_toy"


def elsewhere(tmp_path):
    """A folder for the model, and a valid file outside of it."""
    (tmp_path / "outside.safetensors").write_bytes(VALID)
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def make_folder(path):
    path.mkdir()


def make_pipe(path):
    os.mkfifo(path)


def make_link_to_a_device(path):
    path.symlink_to("/dev/zero")


def make_link_out(path):
    path.symlink_to("../outside.safetensors")


def make_absolute_link_out(path):
    path.symlink_to(path.parent.parent / "outside.safetensors")


def make_dangling_link(path):
    path.symlink_to("nowhere.safetensors")


def make_loop(path):
    path.symlink_to(path.name)


def make_link_over_a_link(path):
    path.with_name("folder").symlink_to("..")
    path.symlink_to("folder/outside.safetensors")


PLACES = {
    make_folder: "is not a regular file",
    make_pipe: "is not a regular file",
    make_link_to_a_device: "is not a regular file",
    make_link_out: "leads out of its folder",
    make_absolute_link_out: "leads out of its folder",
    make_link_over_a_link: "leads out of its folder",
    make_dangling_link: "cannot be read",
    make_loop: "cannot be read",
}


@pytest.mark.parametrize("make", PLACES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("action", [READ, READ_FOLDER], ids=["file", "folder"])
def test_what_is_no_file_of_the_folder_is_refused(server, tmp_path, make, action):
    folder = elsewhere(tmp_path)
    make(folder / "model.safetensors")
    target = folder if action == READ_FOLDER else None
    refuse(server, folder, PLACES[make], action, target=target)


# Shards


def index(**places):
    """An index file's content."""
    return json.dumps(
        {
            "weight_map": {
                **dict.fromkeys(HEADER.keys() - {"__metadata__"}, "a.safetensors"),
                **places,
            }
        }
    )


INDICES = {
    "a shard in the folder above": (index(weight="../outside.safetensors"), "outside its folder"),
    "a shard at an absolute path": (index(weight="/x.safetensors"), "outside its folder"),
    "a shard in a folder below": (index(weight="b/x.safetensors"), "outside its folder"),
    "a shard behind a backslash": (index(weight="..\\x.safetensors"), "outside its folder"),
    "a shard with NUL": (index(weight="a\0.safetensors"), "outside its folder"),
    "a pickled shard": (index(weight="a.bin"), "outside its folder"),
    "a shard that is a list": (index(weight=["a.safetensors"]), "outside its folder"),
    "a tensor the shard lacks": (index(more="a.safetensors"), "lacks more"),
    "a tensor the index lacks": (
        json.dumps({"weight_map": {"half": "a.safetensors"}}),
        "not listed in the index",
    ),
    "a tensor twice": (index()[:-2] + ', "weight": "a.safetensors"}}', "twice"),
    "a name that colours terminals": (index(**{"\x1b[1m": "a.safetensors"}), "impossible name"),
    "a list": ("[]", "must hold a JSON object"),
    "a map of nothing": ('{"weight_map": {}}', "no weight_map"),
    "nested beyond reason": ('{"weight_map":' * 5000, "nested deeper"),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_hostile_index_is_refused(server, tmp_path, name):
    folder = elsewhere(tmp_path)
    (folder / "a.safetensors").write_bytes(VALID)
    content, says = INDICES[name]
    (folder / INDEX_NAME).write_text(content)
    file = "a.safetensors" if name.startswith("a tensor the") else INDEX_NAME
    refuse(server, folder, says, READ_FOLDER, file, folder)


# Files that are whole, but not of this network


def rename(tensors):
    tensors["model.layers.0.attention.q_proj.weight"] = tensors.pop(A_NAME)


def drop(tensors):
    del tensors[A_NAME]


def add(tensors):
    tensors["more"] = mx.zeros(3)


def turn(tensors):
    tensors[A_NAME] = tensors[A_NAME].reshape(-1)


def swap_dtype(tensors):
    tensors[A_NAME] = tensors[A_NAME].view(mx.int32)


def swap_floats(tensors):
    tensors[A_NAME] = tensors[A_NAME].view(mx.bfloat16).reshape(2, 32, 32)[0]


def put_nan(tensors):
    tensors[A_NAME] = mx.where(mx.arange(32) == 3, mx.nan, tensors[A_NAME])


def put_infinity(tensors):
    tensors[A_NAME] = mx.where(mx.arange(32) == 3, -mx.inf, tensors[A_NAME])


A_NAME = "model.layers.0.self_attn.q_proj.weight"
MISFITS = {
    rename: "attention.q_proj",
    drop: "1 missing",
    add: "1 unexpected: more",
    turn: "wrong shape",
    swap_dtype: "wrong dtype",
    swap_floats: "wrong dtype",
    put_nan: "NaN or infinity",
    put_infinity: "NaN or infinity",
}


@pytest.mark.parametrize("spoil", MISFITS, ids=lambda spoil: spoil.__name__)
def test_a_file_for_another_network_changes_nothing(server, tmp_path, spoil):
    tensors = weights_of(toy_model())
    spoil(tensors)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    refuse(server, tmp_path, MISFITS[spoil], FILL)


def test_links_within_the_folder_and_to_the_blobs_of_the_hub_cache_are_followed(server, tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "feed").write_bytes(VALID)
    (snapshot / "model.safetensors").symlink_to("../../blobs/feed")
    (tmp_path / "shortcut").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "shortcut"):
        outcome = run_case(server, CLASS, READ_FOLDER, str(folder), tmp_path)
        assert outcome.kind == "result", outcome
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../other")
    (tmp_path / "other").write_bytes(VALID)
    refuse(server, tmp_path, "leads out", READ_FOLDER, target=snapshot)
