"""Files are validated before MLX sees them, and replaced whole or not at all."""

import json
import pickle
import struct

import mlx.core as mx
import pytest

from workbench.errors import FileFormatError, SourceError, WorkbenchError
from workbench.models.files import (
    INDEX_NAME,
    read_json,
    read_safetensors,
    read_weights,
    replacing,
    write_json,
    write_safetensors,
)

DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint32, mx.int64, mx.bool_]


def bits(array):
    """The array's bytes."""
    return bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))


def sharded(folder, **places):
    """Two shards, `a` and `b`, and an index that sends each name to its place."""
    write_safetensors(folder / "model-1.safetensors", {"a": mx.ones((2,))})
    write_safetensors(folder / "model-2.safetensors", {"b": mx.zeros((3,))})
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", **places}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_safetensors_round_trip_is_bit_equal(tmp_path, dtype):
    written = (mx.random.normal((3, 5), key=mx.random.key(1)) * 100).astype(dtype)
    write_safetensors(tmp_path / "x.safetensors", {"t": written, "turned": written.T})
    read = read_safetensors(tmp_path / "x.safetensors")
    assert (read["t"].dtype, read["t"].shape) == (dtype, (3, 5))
    assert bits(read["t"]) == bits(written)
    assert bits(read["turned"]) == bits(written.T)


def test_nan_payloads_and_signed_zeros_survive(tmp_path):
    odd = mx.array([0x7FC12345, 0x80000000, 0xFF800000], dtype=mx.uint32).view(mx.float32)
    write_safetensors(tmp_path / "x.safetensors", {"t": odd})
    assert bits(read_safetensors(tmp_path / "x.safetensors")["t"]) == bits(odd)


def test_shards_are_joined_by_their_index(tmp_path):
    weights = read_weights(sharded(tmp_path))
    assert {name: array.shape for name, array in weights.items()} == {"a": (2,), "b": (3,)}


def test_shards_without_an_index_are_joined_too(tmp_path):
    (sharded(tmp_path) / INDEX_NAME).unlink()
    assert set(read_weights(tmp_path)) == {"a", "b"}


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"model-2\.safetensors is missing"):
        read_weights(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    with pytest.raises(FileFormatError, match="lacks c, which the index promises"):
        read_weights(sharded(tmp_path, c="model-1.safetensors"))


def test_a_tensor_in_two_shards_raises(tmp_path):
    write_safetensors(sharded(tmp_path) / "model-2.safetensors", {"a": mx.ones(2), "b": mx.ones(3)})
    with pytest.raises(FileFormatError, match="a is in more than one file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/x.safetensors", "model.bin", 7])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, place):
    write_safetensors(tmp_path / "secret.safetensors", {"c": mx.ones(1)})
    (tmp_path / "model").mkdir()
    with pytest.raises(FileFormatError, match="outside its folder"):
        read_weights(sharded(tmp_path / "model", c=place))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_a_malformed_index_raises(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(FileFormatError, match=INDEX_NAME):
        read_weights(tmp_path)


def test_a_folder_without_safetensors_raises_with_the_cure(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(SourceError, match="convert them to safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_file_raises(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": mx.ones((8, 8))})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"model\.safetensors: is not a whole safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"<!DOCTYPE html><html><body>404: not found</body></html>",
        pickle.dumps({"model.embed_tokens.weight": [0.0] * 100}),
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 9) + b'{"a": 1} ',
    ],
    ids=["git-lfs pointer", "html", "pickle", "huge header", "foreign header"],
)
def test_a_foreign_file_under_our_name_raises(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"model\.safetensors"):
        read_weights(tmp_path)


def test_trailing_bytes_raise_although_mlx_would_accept_them(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": mx.ones(4)})
    path.write_bytes(path.read_bytes() + b"more")
    assert mx.load(str(path))
    with pytest.raises(FileFormatError):
        read_safetensors(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def fail():
        with replacing(path) as temporary:
            temporary.write_text('{"new"')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"new": float("nan")})
    assert read_json(tmp_path / "x.json") == {"old": 1}


def test_a_folder_in_the_way_raises_and_leaves_no_temporary_file(tmp_path):
    (tmp_path / "x.safetensors" / "inner").mkdir(parents=True)
    with pytest.raises(FileFormatError, match=r"x\.safetensors: cannot be written"):
        write_safetensors(tmp_path / "x.safetensors", {"a": mx.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_place_that_cannot_be_written_raises_a_project_error():
    with pytest.raises(WorkbenchError, match="cannot be written"):
        write_safetensors("/proc/x.safetensors", {"a": mx.ones(3)})


def test_tensors_read_from_a_file_survive_its_replacement(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": mx.arange(6)})
    lazy = read_safetensors(path)["a"]
    write_safetensors(path, {"a": mx.zeros(6, dtype=lazy.dtype)})
    assert lazy.tolist() == [0, 1, 2, 3, 4, 5]
    assert read_safetensors(path)["a"].tolist() == [0] * 6


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"x"', b'\xef\xbb\xbf{"a": 1}', b'{"a": "\xff"}', b"[" * 100_000],
    ids=["empty", "cut", "list", "string", "BOM", "not UTF-8", "deep"],
)
def test_json_that_is_no_object_raises_and_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"config\.json: "):
        read_json(tmp_path / "config.json")


def test_absent_json_raises(tmp_path):
    with pytest.raises(FileFormatError, match="No such file"):
        read_json(tmp_path / "config.json")


def test_json_keeps_unicode(tmp_path):
    content = {"name": "Curaçao 🏝", "nested": {"list": [1, 2.5, None, True]}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
