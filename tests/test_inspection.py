"""Layouts of weights files, names of modules, and the order of rows read from the weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.toy import toy_base, toy_model
from tests.toy_gguf import interleaved_rows, write_toy_gguf
from workbench.errors import ConfigError, FileFormatError
from workbench.models.files import write_safetensors
from workbench.models.gguf_llama import half_split_rows
from workbench.models.inspection import half_apart, read_layout, row_likeness, split_name
from workbench.models.loading import save_weights

HEADS, HEAD_DIM = 4, 16


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A toy model's weights in one safetensors file."""
    path = tmp_path_factory.mktemp("layout") / "model.safetensors"
    save_weights(toy_model(), path)
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The same model as a GGUF file, its matrices in blocks."""
    base = toy_base()
    path = tmp_path_factory.mktemp("layout") / "model.gguf"
    return write_toy_gguf(path, base.model, base.tokenizer, kind="Q8_0")


def test_layout_of_safetensors_names_every_parameter_and_tiles_the_file(weights_file):
    layout = read_layout(weights_file)
    parameters = dict(tree_flatten(toy_model().parameters()))
    assert set(layout.name) == set(parameters)
    assert (layout.start.to_numpy()[1:] == layout.end.to_numpy()[:-1]).all()
    assert layout.end.max() == weights_file.stat().st_size
    for row in layout.itertuples():
        assert (row.shape, row.num_bytes) == (
            parameters[row.name].shape,
            parameters[row.name].nbytes,
        )


def test_bytes_at_a_layouts_offset_are_the_parameter(weights_file):
    parameters = dict(tree_flatten(toy_model().parameters()))
    content = weights_file.read_bytes()
    for row in read_layout(weights_file).itertuples():
        numbers = np.frombuffer(content[row.start : row.end], np.float32).reshape(row.shape)
        assert np.array_equal(numbers, np.array(parameters[row.name])), row.name


def test_layout_calls_dtypes_as_the_file_does(tmp_path):
    tensors = {"a": mx.zeros((2, 3), mx.bfloat16), "b": mx.zeros((4,), mx.int32)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    layout = read_layout(tmp_path / "x.safetensors").set_index("name")
    assert layout.dtype.to_dict() == {"a": "BF16", "b": "I32"}
    assert layout.num_bytes.to_dict() == {"a": 12, "b": 16}


def test_layout_of_gguf_is_in_the_order_of_the_bytes_and_within_the_file(gguf_file):
    layout = read_layout(gguf_file)
    assert len(layout) == len(tree_flatten(toy_model().parameters()))
    assert {"Q8_0", "F32"} == set(layout.dtype)
    assert (layout.start.to_numpy()[1:] >= layout.end.to_numpy()[:-1]).all()
    assert layout.end.max() <= gguf_file.stat().st_size


@pytest.mark.parametrize("keep", [0, 4, 9, 200, -1])
@pytest.mark.parametrize("kind", ["weights_file", "gguf_file"])
def test_truncated_file_is_refused(kind, keep, tmp_path, request):
    whole = request.getfixturevalue(kind)
    cut = tmp_path / whole.name
    cut.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=whole.name):
        read_layout(cut)


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf"])
def test_absent_file_is_refused(name, tmp_path):
    with pytest.raises(FileFormatError):
        read_layout(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "block", "module"),
    [
        ("model.layers.3.mlp.up_proj.weight", "layer 3", "mlp.up_proj"),
        ("model.layers.12.self_attn.q_proj.bias", "layer 12", "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn.weight", "layer 0", "attn.c_attn"),
        ("blk.7.attn_q.weight", "layer 7", "attn_q"),
        ("model.embed_tokens.weight", "embed_tokens", "embed_tokens"),
        ("lm_head.weight", "lm_head", "lm_head"),
        ("scale", "scale", "scale"),
        ("model.layers.0.gain", "layer 0", "gain"),
    ],
)
def test_names_are_split_into_block_and_module(name, block, module):
    assert split_name(name) == (block, module)


def projections(random: np.random.Generator, layers: int = 12) -> list[np.ndarray]:
    """Half-split projections in which the two rows of a rotary pair are alike in length."""
    shape = (layers, HEADS, 1, HEAD_DIM // 2, 1)
    lengths = np.exp(0.8 * random.standard_normal(shape) + 0.1 * random.standard_normal(shape))
    rows = lengths * random.standard_normal((layers, HEADS, 2, HEAD_DIM // 2, 64))
    return list(rows.reshape(layers, HEADS * HEAD_DIM, 64))


def test_partners_are_found_half_a_head_apart_only_in_the_half_split_order():
    half_split = projections(np.random.default_rng(0))
    stored = [interleaved_rows(weight, HEADS) for weight in half_split]
    undone = [half_split_rows(weight, HEADS) for weight in stored]
    as_loaded, as_stored = row_likeness(undone, HEADS), row_likeness(stored, HEADS)
    assert half_apart(as_loaded) > 0.8
    assert half_apart(as_stored) < 0.3
    neighbours = np.diagonal(as_stored, offset=1)[::2]
    assert neighbours.mean() == pytest.approx(half_apart(as_loaded))


def test_likeness_does_not_depend_on_how_loud_a_head_is():
    weights = projections(np.random.default_rng(1))
    louder = [weight.copy() for weight in weights]
    louder[0][:HEAD_DIM] *= 7
    louder[3] *= 0.1
    assert np.allclose(row_likeness(weights, HEADS), row_likeness(louder, HEADS))


def test_a_head_with_a_row_of_zeros_is_left_out():
    weights = projections(np.random.default_rng(3))
    emptied = [*weights, np.concatenate([np.zeros((HEAD_DIM, 64)), weights[0][HEAD_DIM:]])]
    same = [*weights, np.concatenate([np.zeros((1, 64)), weights[0][1:]])]
    assert np.array_equal(row_likeness(emptied, HEADS), row_likeness(same, HEADS))


def test_likeness_is_symmetric_with_ones_on_its_diagonal():
    likeness = row_likeness(projections(np.random.default_rng(2)), HEADS)
    assert likeness.shape == (HEAD_DIM, HEAD_DIM)
    assert np.allclose(likeness, likeness.T)
    assert np.allclose(np.diagonal(likeness), 1)


@pytest.mark.parametrize(
    ("weights", "heads"),
    [([], 4), ([np.ones((8, 2))], 2), ([np.ones((9, 2))] * 4, 2), ([np.ones((8, 2))] * 4, 0)],
    ids=["none", "two heads in all", "rows that make no heads", "no heads"],
)
def test_rows_that_cannot_be_compared_are_refused(weights, heads):
    with pytest.raises(ConfigError, match="heads"):
        row_likeness(weights, heads)
