"""Files become a network bit for bit: folders, the report of every tensor, and back to a file."""

import json
import math

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import quantize_model

import workbench as wb
from tests.test_layers import close
from tests.toy import TOY_CONFIG, VOCAB_SIZE, save_toy_folder, toy_model, toy_tokenizer
from tests.toy_folders import TOKENS, equal_bits, rewrite, weights_of
from workbench.errors import ConfigError, FileFormatError, WeightsError
from workbench.models.files import INDEX_NAME, read_safetensors, write_safetensors
from workbench.models.llama import Llama
from workbench.models.loading import embedding_rows
from workbench.models.report import compare
from workbench.models.safetensors_header import read_header


def shard(folder):
    """Split a folder's weights into two shards with an index."""
    tensors = sorted(read_safetensors(folder / "model.safetensors").items())
    weight_map = {}
    for number, part in enumerate((tensors[:7], tensors[7:])):
        name = f"model-{number}.safetensors"
        write_safetensors(folder / name, dict(part))
        weight_map.update(dict.fromkeys(dict(part), name))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


# Folders


def test_a_folder_loads_bit_for_bit(model_folder):
    base = wb.load_model(model_folder)
    assert equal_bits(weights_of(base.model), weights_of(toy_model()))
    assert base.report.complete
    assert len(base.report.loaded) == len(weights_of(base.model))
    assert base.report.total_bytes == sum(w.nbytes for w in weights_of(base.model).values())
    assert base.config.hidden_size == TOY_CONFIG["hidden_size"]
    assert base.tokenizer.decode(base.tokenizer("héllo")["input_ids"]) == "héllo"
    assert base.eos_token_ids == {2}


def test_a_sharded_folder_equals_the_single_file(model_folder):
    single = wb.load_model(model_folder)
    shard(model_folder)
    assert equal_bits(weights_of(wb.load_model(model_folder).model), weights_of(single.model))


def test_loading_twice_gives_two_equal_and_separate_models(model_folder):
    first, second = wb.load_model(model_folder), wb.load_model(model_folder)
    first.model.model.norm.weight = first.model.model.norm.weight + 1
    assert equal_bits(weights_of(second.model), weights_of(toy_model()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_the_dtype_option_decides_the_dtype_in_memory(model_folder, dtype):
    rewrite(model_folder, lambda t: t.update({k: v.astype(mx.bfloat16) for k, v in t.items()}))
    base = wb.load_model(model_folder, dtype=dtype)
    assert {w.dtype for w in weights_of(base.model).values()} == {dtype}
    assert set(base.report.table()["file_dtype"]) == {"bfloat16"}
    name = str(dtype).removeprefix("mlx.core.")
    assert set(base.report.table()["dtype"]) == {name}


def test_a_bfloat16_folder_keeps_its_numbers_in_float32(model_folder):
    rounded = {k: v.astype(mx.bfloat16) for k, v in weights_of(toy_model()).items()}
    rewrite(model_folder, lambda t: t.update(rounded))
    loaded = weights_of(wb.load_model(model_folder, dtype=mx.float32).model)
    assert equal_bits(loaded, {k: v.astype(mx.float32) for k, v in rounded.items()})


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_quantised_by_mlx_lm_gives_mlx_lms_logits(model_folder, bits):
    model, config = mlx_lm.utils.load_model(model_folder)
    model, config = quantize_model(model, config, group_size=32, bits=bits)
    mlx_lm.utils.save_model(model_folder, model)
    mlx_lm.utils.save_config(config, model_folder / "config.json")
    base = wb.load_model(model_folder, dtype=mx.float32)
    assert base.report.complete
    assert close(base.model(TOKENS), model(TOKENS), 1e-4)
    assert not close(base.model(TOKENS), toy_model()(TOKENS), 1e-4)


def test_a_tied_folder_may_store_the_head_twice(model_folder):
    embedding = toy_model().model.embed_tokens.weight
    rewrite(model_folder, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert wb.load_model(model_folder).report.names("ignored") == ["lm_head.weight"]


def test_an_embedding_larger_than_the_tokenizer_is_fine(tmp_path):
    folder = save_toy_folder(tmp_path / "m", vocab_size=VOCAB_SIZE + 61)
    assert embedding_rows(wb.load_model(folder).model, None) == VOCAB_SIZE + 61


def test_another_tokenizer_can_be_given(tmp_path, model_folder):
    other = toy_tokenizer()
    other.add_special_tokens({"eos_token": "<|endoftext|>"})
    other.save_pretrained(tmp_path / "other")
    base = wb.load_model(model_folder, tokenizer=tmp_path / "other")
    assert base.tokenizer.eos_token_id == 0
    assert base.eos_token_ids == {0, 2}


def test_the_real_model_is_complete_and_as_published(smollm2):
    assert smollm2.report.complete
    assert len(smollm2.report.loaded) == 30 * 9 + 2
    parameters = sum(w.size for w in weights_of(smollm2.model).values())
    assert parameters == 134_515_008
    assert smollm2.report.total_bytes == 4 * parameters
    assert smollm2.eos_token_ids == {2}


# The report


def test_the_report_escapes_a_hostile_tensor_name(model_folder):
    hostile = "<img src=x onerror=alert(1)>"
    rewrite(model_folder, lambda tensors: tensors.update({hostile: mx.ones(1)}))
    report = wb.load_model(model_folder, strict=False).report
    assert hostile in report.unexpected
    page = report._repr_html_()
    assert "<img" not in page
    assert "&lt;img src=x" in page


def test_the_report_escapes_its_notes():
    page = compare({}, {}, notes=["<script>alert(1)</script>"])._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_reports_table_has_shape_dtype_and_bytes_of_every_tensor():
    model = toy_model()
    table = compare(weights_of(model), weights_of(model)).table()
    assert list(table["name"]) == list(weights_of(model))
    expected = [math.prod(shape) * 4 for shape in table["file_shape"]]
    assert list(table["num_bytes"]) == expected


# save_weights and load_weights (R2)


@pytest.fixture
def saved(tmp_path):
    """A model and the file of its weights."""
    model, path = toy_model(seed=5, tie_word_embeddings=False), tmp_path / "w.safetensors"
    wb.save_weights(model, path)
    return model, path


def test_save_writes_every_parameter_by_name(saved):
    model, path = saved
    assert equal_bits(read_safetensors(path), weights_of(model))


def test_load_fills_every_parameter(saved):
    model, path = saved
    other = toy_model(seed=6, tie_word_embeddings=False)
    report = wb.load_weights(other, path)
    assert report.complete
    assert len(report.loaded) == len(weights_of(model))
    assert mx.array_equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_a_round_trip_is_bit_equal(tmp_path, dtype):
    model, other = toy_model(seed=5), toy_model(seed=6)
    model.set_dtype(dtype)
    other.set_dtype(dtype)
    wb.save_weights(model, tmp_path / "w.safetensors")
    wb.load_weights(other, tmp_path / "w.safetensors")
    assert equal_bits(weights_of(other), weights_of(model))


def test_saving_and_loading_leave_the_saved_model_as_it_was(saved):
    model, path = saved
    wb.load_weights(model, path)
    assert equal_bits(weights_of(model), weights_of(toy_model(seed=5, tie_word_embeddings=False)))


def test_the_metadata_says_who_wrote_the_file_and_what_the_caller_wants(saved):
    model, path = saved
    assert wb.read_metadata(path).keys() == {"format", "sha256"}
    told = {"run": "capitals-001", "note": 'é "quoted"\n', "": ""}
    wb.save_weights(model, path, told)
    _, theirs = mx.load(str(path), return_metadata=True)
    assert wb.read_metadata(path) == theirs
    assert theirs == {**told, "format": "mlx", "sha256": theirs["sha256"]}
    assert wb.load_weights(model, path).complete


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"sha256": "0"}, "'sha256' is written by save_weights"),
        ({"format": "pt"}, "'format' is written by save_weights"),
        ({"step": 3}, "texts by name"),
        ({3: "step"}, "texts by name"),
        ({"half": "\ud800"}, "texts by name"),
        (["a", "b"], "texts by name"),
        ({"long": "x" * 1_000_001}, "longer than"),
    ],
)
def test_metadata_that_no_file_can_carry_are_refused(saved, metadata, says):
    model, path = saved
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=says):
        wb.save_weights(model, path, metadata)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_a_flipped_bit_of_any_tensor_raises_and_changes_nothing(tmp_path, strict, dtype):
    model, path = toy_model(seed=5), tmp_path / "w.safetensors"
    model.set_dtype(dtype)
    wb.save_weights(model, path)
    before, whole = wb.fingerprint(model), path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for entry in read_header(path).values():
        spoilt = bytearray(whole)
        spoilt[start + entry.start] ^= 1  # the smallest that a number can change
        path.write_bytes(spoilt)
        with pytest.raises(FileFormatError, match=r"w\.safetensors: holds other numbers"):
            wb.load_weights(model, path, strict=strict)
    assert wb.fingerprint(model) == before


def test_tensors_that_changed_places_are_not_what_was_written(saved):
    model, path = saved
    tensors, metadata = mx.load(str(path), return_metadata=True)
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)]
    swapped = {**tensors, names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    write_safetensors(path, swapped, metadata)
    with pytest.raises(FileFormatError, match="its SHA-256 is another"):
        wb.load_weights(model, path)
    write_safetensors(path, swapped)  # a file without a seal, as other tools write it
    assert wb.load_weights(model, path).complete


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_corrupted_file_raises_and_changes_nothing(saved, keep):
    model, path = saved
    before = {name: mx.array(w) for name, w in weights_of(model).items()}
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"w\.safetensors"):
        wb.load_weights(model, path)
    assert equal_bits(weights_of(model), before)


@pytest.mark.parametrize(
    ("changes", "dtype", "named"),
    [
        ({"num_hidden_layers": 3}, mx.float32, "9 missing"),
        ({"num_hidden_layers": 1}, mx.float32, "9 unexpected"),
        ({"vocab_size": 300}, mx.float32, "wrong shape: model.embed_tokens.weight"),
        ({}, mx.bfloat16, "wrong dtype: .*float32"),
    ],
)
def test_weights_of_another_model_raise_and_change_nothing(saved, changes, dtype, named):
    other = toy_model(seed=6, tie_word_embeddings=False, **changes)
    other.set_dtype(dtype)
    before = weights_of(other)
    with pytest.raises(WeightsError, match=named):
        wb.load_weights(other, saved[1])
    assert equal_bits(weights_of(other), before)


@pytest.mark.parametrize("setting", [{"sliding_window": 64}, {"rope_traditional": True}])
def test_what_our_llama_does_not_do_is_left_to_mlx_lm(tmp_path, setting):
    folder = save_toy_folder(tmp_path / "toy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    model = wb.load_model(folder).model
    assert type(model).__module__ == "mlx_lm.models.llama"
    assert isinstance(wb.load_model(save_toy_folder(tmp_path / "plain")).model, Llama)
