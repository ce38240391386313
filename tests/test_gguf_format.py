"""GGUF: a malformed file raises and never kills; its numbers are those that MLX reads."""

import random
import struct
import time

import mlx.core as mx
import numpy as np
import pytest

from tests.toy_gguf import interleaved_rows, write_tensors
from workbench.errors import ConfigError, FileFormatError
from workbench.models.gguf_format import GGUFFile
from workbench.models.gguf_llama import half_split_rows, hugging_face_name
from workbench.models.sources import find_model

VALUES = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
TENSORS = {"tensor_a": (VALUES, "F32"), "tensor_b": (VALUES, "Q8_0")}
HUGE = 2**63


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a small valid file."""
    return write_tensors(tmp_path_factory.mktemp("gguf") / "x.gguf", TENSORS).read_bytes()


def put(after, skip, code, value):
    """A change that writes a number `skip` bytes after the end of a name."""

    def change(content):
        changed = bytearray(content)
        at = content.index(after) + len(after) + skip if after else skip
        struct.pack_into("<" + code, changed, at, value)
        return bytes(changed)

    return change


def length(name, value):
    """A change of the length of a string."""
    return put(name, -len(name) - 8, "Q", value)


def renamed(old, new):
    """A change of a name of the same length."""
    return lambda content: content.replace(old, new)


MALFORMED = {
    "empty": lambda content: b"",
    "magic only": lambda content: content[:4],
    "cut in the header": lambda content: content[:20],
    "cut in a key": lambda content: content[: content.index(b"key_one") + 3],
    "cut in a tensor's entry": lambda content: content[: content.index(b"tensor_b") + 12],
    "cut before the data": lambda content: content[: content.index(b"tensor_b") + 40],
    "cut in the data": lambda content: content[:-64],
    "html": lambda content: b"<html>" + content[6:],
    "version 1": put(b"", 4, "I", 1),
    "version of the other endianness": put(b"", 4, "I", 0x03000000),
    "huge tensor count": put(b"", 8, "Q", HUGE),
    "plausible tensor count": put(b"", 8, "Q", 20),
    "huge entry count": put(b"", 16, "Q", HUGE),
    "one entry too many": put(b"", 16, "Q", 8),
    "huge key length": length(b"key_one", HUGE),
    "key longer than the file": length(b"key_one", 1_000_000),
    "unknown value type": put(b"key_one", 0, "I", 13),
    "array of unknown type": put(b"words", 4, "I", 99),
    "nested array": put(b"words", 4, "I", 9),
    "huge array": put(b"numbers", 8, "Q", HUGE),
    "huge array of strings": put(b"words", 8, "Q", HUGE),
    "array longer than the file": put(b"words", 8, "Q", 1_000),
    "string in an array longer than the file": length(b"alpha", 1_000_000),
    "huge string in an array": length(b"alpha", 2**64 - 1),
    "key that is not UTF-8": renamed(b"key_one", b"key_\xff\xfe\xff"),
    "string that is not UTF-8": renamed(b"alpha", b"alp\xc3\x28"),
    "tensor name that is not UTF-8": renamed(b"tensor_a", b"tensor_\x80"),
    "the same key twice": renamed(b"key_two", b"key_one"),
    "the same tensor twice": renamed(b"tensor_b", b"tensor_a"),
    "huge tensor name": length(b"tensor_a", HUGE),
    "no dimensions": put(b"tensor_a", 0, "I", 0),
    "100 dimensions": put(b"tensor_a", 0, "I", 100),
    "a dimension of zero": put(b"tensor_a", 4, "Q", 0),
    "a huge dimension": put(b"tensor_a", 12, "Q", HUGE),
    "a dimension that wraps to 0 bytes": put(b"tensor_a", 12, "Q", 2**58),
    "a row that is no whole block": put(b"tensor_b", 4, "Q", 63),
    "a removed tensor type": put(b"tensor_a", 20, "I", 4),
    "an unknown tensor type": put(b"tensor_a", 20, "I", 999),
    "an offset outside": put(b"tensor_b", 24, "Q", 1 << 40),
    "an offset that wraps": put(b"tensor_b", 24, "Q", 2**64 - 64),
    "an offset off the alignment": put(b"tensor_b", 24, "Q", 1025),
    "overlapping tensors": put(b"tensor_b", 24, "Q", 64),
    "alignment 0": put(b"general.alignment", 4, "I", 0),
    "alignment 7": put(b"general.alignment", 4, "I", 7),
    "huge alignment": put(b"general.alignment", 4, "I", 1 << 31),
    "alignment of another type": put(b"general.alignment", 0, "I", 6),
}


def test_the_file_that_is_made_malformed_is_valid(valid, tmp_path):
    (tmp_path / "x.gguf").write_bytes(valid)
    file = GGUFFile(tmp_path / "x.gguf")
    assert np.array_equal(file.read("tensor_a"), VALUES)
    assert file.metadata["general.alignment"] == 64
    assert file.metadata["key_one"] == 42
    assert file.metadata["words"] == ["alpha", "beta"]
    assert file.metadata["numbers"] == [1, 2, 3]


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_raises_at_once(valid, tmp_path, name):
    content = MALFORMED[name](valid)
    assert content != valid
    (tmp_path / "x.gguf").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(FileFormatError, match=r"x\.gguf: "):
        GGUFFile(tmp_path / "x.gguf")
    assert time.perf_counter() - start < 5


def test_random_damage_gives_numbers_or_a_project_error(valid, tmp_path):
    chance, raised = random.Random(0), 0
    for _ in range(400):
        content = bytearray(valid)
        at = chance.randrange(content.index(b"tensor_b") + 40)
        content[at] = chance.randrange(256)
        (tmp_path / "x.gguf").write_bytes(content)
        try:
            file = GGUFFile(tmp_path / "x.gguf")
            sizes = [file.read(name).size for name in file.tensors]
            assert all(size < 1_000 for size in sizes)
        except FileFormatError:
            raised += 1
    assert raised > 100


def test_an_absent_file_raises(tmp_path):
    with pytest.raises(FileFormatError, match=r"no\.gguf: cannot be read"):
        GGUFFile(tmp_path / "no.gguf")


def test_a_type_that_nobody_dequantises_raises_on_reading(valid, tmp_path):
    (tmp_path / "x.gguf").write_bytes(put(b"tensor_a", 20, "I", 26)(valid))  # I32
    with pytest.raises(FileFormatError, match=r"tensor_a.*I32.*cannot be dequantised"):
        GGUFFile(tmp_path / "x.gguf").read("tensor_a")


def test_a_tensor_that_is_cut_off_stays_unread_by_mlx(valid, tmp_path):
    (tmp_path / "x.gguf").write_bytes(MALFORMED["an unknown tensor type"](valid))
    assert "tensor_a" not in mx.load(str(tmp_path / "x.gguf"))  # why MLX does not read it for us
    with pytest.raises(FileFormatError, match="unknown type"):
        GGUFFile(tmp_path / "x.gguf")


def by_mlx(path, name):
    """The tensor as MLX reads and dequantises it, in float32."""
    tensors = mx.load(str(path))
    stem = name.removesuffix(".weight")
    weight, scales = tensors[name], tensors.get(f"{stem}.scales")
    if scales is None:
        return np.array(weight.astype(mx.float32))
    scales, biases = scales.astype(mx.float32), tensors[f"{stem}.biases"].astype(mx.float32)
    bits = weight.shape[-1] // scales.shape[-1]  # 32 values of so many bits in as many words
    return np.array(mx.dequantize(weight, scales, biases, group_size=32, bits=bits))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "F32"])
def test_values_equal_those_that_mlx_reads(tmp_path, kind):
    path = write_tensors(tmp_path / "x.gguf", {"a.weight": (VALUES, kind)})
    ours = GGUFFile(path).read("a.weight").astype(np.float32)
    np.testing.assert_allclose(ours, by_mlx(path, "a.weight"), rtol=1e-5, atol=1e-6)
    assert np.abs(ours - VALUES).max() < 0.5


def test_bfloat16_is_float32_with_the_low_half_cut(tmp_path):
    path = write_tensors(tmp_path / "x.gguf", {"a.weight": (VALUES, "BF16")})
    expected = np.array(mx.array(VALUES).astype(mx.bfloat16).astype(mx.float32))
    assert np.array_equal(GGUFFile(path).read("a.weight"), expected)


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.weight", "blk.29.ffn_down.weight", "blk.3.attn_norm.weight"]
)
def test_values_of_the_real_file_equal_those_that_mlx_reads(name):
    path = find_model("smollm2-135m")
    ours = GGUFFile(path).read(name)
    np.testing.assert_allclose(ours, by_mlx(path, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_half_split_rows_undo_ggufs_order(shape):
    weight = np.arange(np.prod(shape)).reshape(shape)
    assert np.array_equal(half_split_rows(interleaved_rows(weight, 3), 3), weight)


def test_interleaved_rope_on_ggufs_rows_scores_as_half_split_rope_on_ours():
    heads, head_dim, dim = 2, 8, 6
    x = mx.random.normal((1, 5, dim), key=mx.random.key(0))

    def scores(weights, traditional):
        q, k = ((x @ mx.array(w).T).reshape(1, 5, heads, head_dim).swapaxes(1, 2) for w in weights)
        rope = {"traditional": traditional, "base": 1e4, "scale": 1.0, "offset": 0}
        q, k = mx.fast.rope(q, head_dim, **rope), mx.fast.rope(k, head_dim, **rope)
        return np.array(q @ k.swapaxes(-1, -2))

    stored = np.random.default_rng(1).standard_normal((2, heads * head_dim, dim)).astype(np.float32)
    ours = [half_split_rows(weight, heads) for weight in stored]
    np.testing.assert_allclose(scores(stored, True), scores(ours, False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [0, 5, None, [2, 2], 24])
def test_rows_that_make_no_heads_raise(heads):
    with pytest.raises(ConfigError, match="24 rows do not make"):
        half_split_rows(np.zeros((24, 2)), heads)


def test_names_become_those_of_hugging_face():
    assert hugging_face_name("blk.11.attn_q.weight") == "model.layers.11.self_attn.q_proj.weight"
    assert hugging_face_name("output.weight") == "lm_head.weight"
    assert hugging_face_name("blk.0.ffn_gate_exps.weight") == "blk.0.ffn_gate_exps.weight"
