"""A nanochat GPT in the rest of the house: loaded, saved, trained, adapted, checked, exported."""

import dataclasses
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model as load_with_mlx_lm
from mlx_lm.utils import quantize_model, save_config, save_model

import workbench as wb
from tests.process import run
from tests.test_fused_loss import RAGGED, assert_close, value_and_gradients
from tests.test_layers import close
from tests.toy import toy_dataset, toy_examples
from tests.toy_folders import TOKENS, equal_bits, reconfigure, rewrite, weights_of
from tests.toy_nanochat import mlx_lm_twin, nanochat_base, save_nanochat_folder, toy_nanochat
from tests.toy_preferences import toy_preferences
from workbench.data.batches import Batch, collate
from workbench.errors import ConfigError, FileFormatError, WeightsError
from workbench.models.files import read_safetensors, write_safetensors
from workbench.models.nanochat import NanoChat
from workbench.models.nanochat_config import NanoChatConfig
from workbench.models.stand_ins import intercepted
from workbench.tuning.flops import step_flops
from workbench.tuning.losses import default_loss, fused_loss, plain_loss, supervised_loss
from workbench.tuning.prompt_sharing import SharedPromptLoss
from workbench.tuning.update import accumulate

A_WEIGHT = "transformer.h.1.mlp.c_fc.weight"
LOGITS = """
    import mlx.core as mx
    from mlx_lm.utils import load
    model, _ = load({folder!r})
    mx.save({out!r}, model(mx.array({tokens!r})))
"""


def of_mlx_lm(folder, out):
    """Logits of TOKENS from mlx-lm, in a process that has never heard of us."""
    code = LOGITS.format(folder=str(folder), out=str(out), tokens=TOKENS.tolist())
    assert run(code).code == 0
    return mx.load(str(out))


@pytest.fixture
def folder(tmp_path):
    return save_nanochat_folder(tmp_path / "nano")


# Loading


def test_a_folder_becomes_ours_bit_for_bit(folder):
    base = wb.load_model(folder)
    assert type(base.model) is NanoChat
    assert isinstance(base.config, NanoChatConfig)
    assert base.report.complete
    assert equal_bits(weights_of(base.model), weights_of(toy_nanochat()))
    assert base.eos_token_ids == {2}


def test_a_bfloat16_folder_is_read(folder):
    rewrite(folder, lambda tensors: tensors.update(
        {name: tensor.astype(mx.bfloat16) for name, tensor in tensors.items()}))  # fmt: skip
    narrow = wb.load_model(folder, dtype=mx.bfloat16).model
    assert {w.dtype for w in weights_of(narrow).values()} == {mx.bfloat16}
    assert close(narrow(TOKENS), wb.load_model(folder, dtype=mx.float32).model(TOKENS), 0.1)


def test_a_folder_quantised_by_mlx_lm_gives_mlx_lms_logits(folder):
    model, config = load_with_mlx_lm(folder)
    model, config = quantize_model(model, config, group_size=32, bits=8)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    base = wb.load_model(folder, dtype=mx.float32)
    assert type(base.model) is NanoChat
    assert close(base.model(TOKENS), model(TOKENS), 1e-4)
    kept = wb.load_model(folder, quantise=True).model
    assert close(kept(TOKENS), model(TOKENS), 1e-4)


def test_a_config_that_is_not_nanochats_is_refused_by_its_file(folder):
    reconfigure(folder, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"nano.config\.json: tie_word_embeddings True"):
        wb.load_model(folder)


def test_what_is_missing_from_a_folder_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop(A_WEIGHT))
    with pytest.raises(WeightsError, match=f"1 missing: {A_WEIGHT}"):
        wb.load_model(folder)


# save_weights and load_weights (R2)


@pytest.fixture
def saved(tmp_path):
    """A network and the file of its weights."""
    model, path = toy_nanochat(seed=5), tmp_path / "w.safetensors"
    wb.save_weights(model, path)
    return model, path


def test_save_writes_every_parameter_by_name(saved):
    model, path = saved
    assert equal_bits(read_safetensors(path), weights_of(model))
    assert len(read_safetensors(path)) == 2 * 6 + 2


def test_load_fills_every_parameter(saved):
    model, path = saved
    other = toy_nanochat(seed=6)
    assert not close(other(TOKENS), model(TOKENS))
    assert wb.load_weights(other, path).complete
    assert mx.array_equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_a_round_trip_is_bit_equal(tmp_path, dtype):
    model, other = toy_nanochat(seed=5), toy_nanochat(seed=6)
    model.set_dtype(dtype)
    other.set_dtype(dtype)
    wb.save_weights(model, tmp_path / "w.safetensors")
    wb.load_weights(other, tmp_path / "w.safetensors")
    assert equal_bits(weights_of(other), weights_of(model))


def test_integrity_of_names_shapes_dtypes_and_numbers(saved):
    model, path = saved
    report = wb.load_weights(toy_nanochat(seed=6), path)
    of_file = {r.name: (r.file_shape, r.file_dtype) for r in report.records}
    assert of_file == {n: (tuple(w.shape), "float32") for n, w in weights_of(model).items()}
    assert report.total_bytes == sum(w.nbytes for w in weights_of(model).values())
    before = wb.fingerprint(model)
    wb.load_weights(model, path)
    assert wb.fingerprint(model) == before
    spoilt = {**weights_of(model), A_WEIGHT: mx.full(weights_of(model)[A_WEIGHT].shape, mx.nan)}
    write_safetensors(path, spoilt)
    with pytest.raises(WeightsError, match=f"1 tensors hold NaN or infinity: {A_WEIGHT}"):
        wb.load_weights(model, path)
    assert wb.fingerprint(model) == before


def test_the_metadata_come_back(saved):
    model, path = saved
    wb.save_weights(model, path, {"steps": "1000"})
    metadata = wb.read_metadata(path)
    assert (metadata["format"], metadata["steps"]) == ("mlx", "1000")
    assert wb.load_weights(model, path).complete


def truncated(content):
    return content[:-1]


def header_changed(content):
    """One byte of the header: the first name's first letter."""
    place = content.index(b'"transformer') + 1
    return content[:place] + b"\x00" + content[place + 1 :]


def header_length_changed(content):
    return bytes([content[0] ^ 1]) + content[1:]


def number_changed(content):
    """The last number's sign: it stays finite."""
    return content[:-1] + bytes([content[-1] ^ 0x80])


SPOILT = [truncated, header_changed, header_length_changed, number_changed]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_corrupted_file_raises_and_changes_nothing(saved, spoil):
    model, path = saved
    before = wb.fingerprint(model)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(FileFormatError, match=r"w\.safetensors"):
        wb.load_weights(model, path)
    assert wb.fingerprint(model) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(A_WEIGHT), f"1 missing: {A_WEIGHT}"),
        (lambda tensors: tensors.update(extra=mx.ones(2)), "1 unexpected: extra"),
        (lambda tensors: tensors.update({A_WEIGHT: mx.ones((2, 2))}), f"shape: {A_WEIGHT}"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_what_does_not_fit_is_named_and_changes_nothing(saved, change, named):
    model, path = saved
    tensors = weights_of(model)
    change(tensors)
    write_safetensors(path, tensors)
    before = wb.fingerprint(model)
    with pytest.raises(WeightsError, match=named):
        wb.load_weights(model, path)
    assert wb.fingerprint(model) == before


# Training


def lora_nanochat():
    """With an adapter that has left its start."""
    model = toy_nanochat()
    wb.add_lora(model, wb.LoRAConfig(rank=3))
    model.update(tree_map(lambda w: w + 0.05, model.trainable_parameters()))
    return model


@pytest.mark.parametrize("build", [toy_nanochat, lora_nanochat])
@pytest.mark.parametrize("form", [supervised_loss, fused_loss])
def test_supervised_and_fused_loss_are_the_plain_one(build, form):
    """The cap is part of the head, so that logits in chunks are capped, too."""
    model = build()
    expected = value_and_gradients(plain_loss, model, RAGGED)
    assert expected[1]
    assert_close(value_and_gradients(form, model, RAGGED), expected)


def test_the_trainers_loss_is_that_of_targets():
    model, batch = toy_nanochat(), collate(toy_examples([9, 5, 12]), range(3))
    mask = batch.loss_mask[:, 1:]
    targets = mx.array(np.where(mask, batch.tokens[:, 1:], -1))
    total = default_loss(model)(model, batch).item()
    mean = model(mx.array(batch.tokens[:, :-1]), targets).item()
    assert total / batch.num_tokens == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("form", [supervised_loss, fused_loss])
def test_rows_that_begin_alike_and_layers_computed_again(form):
    model, tokens = lora_nanochat(), np.array(toy_examples([40] * 3)[0].tokens)
    tokens = np.stack([tokens, tokens, tokens])
    tokens[1:, 25:] = np.arange(10, 40).reshape(2, 15)
    batch = Batch(tokens, np.arange(40) >= np.full((3, 1), 20), (0, 1, 2))
    assert model.can_share_prompts
    expected = value_and_gradients(plain_loss, model, batch)
    assert_close(value_and_gradients(SharedPromptLoss(form), model, batch), expected)
    loss, gradients = accumulate(model, form, [batch], 0, True)
    assert_close((loss.item(), dict(tree_flatten(gradients))), expected)


def test_the_last_layer_ends_where_it_counts():
    model, batch = toy_nanochat(), collate(toy_examples([9, 5, 12], prompt=4), range(3))
    seen = []

    def watched(module, x):
        seen.append(x.shape)
        return module(x)

    paths = [f"transformer.h.{number}.mlp" for number in range(2)]
    with intercepted(model, dict.fromkeys(paths, watched)):
        mx.eval(supervised_loss(model, batch))
    assert seen == [(3, 11, 32), (batch.num_tokens, 32)]


def trained(base, data=None, objective=None, **settings):
    """Reports of a short training, and what came of its parameters."""
    config = wb.TrainConfig(**{"steps": 4, "micro_batch_size": 2, **settings})
    kept = {"objective": objective} if objective else {}
    trainer = wb.Trainer(base, data or toy_dataset([9, 12, 7, 15], valid=[8]), config, **kept)
    return trainer, list(trainer)


def test_it_trains_from_its_first_weights():
    base = nanochat_base()
    mx.random.seed(0)
    base.model = NanoChat(base.config)
    _, reports = trained(base, steps=30, learning_rate=3e-3)
    assert reports[0].loss == pytest.approx(np.log(base.config.vocab_size), abs=0.02)
    assert reports[-1].loss < 0.8 * reports[0].loss


def test_kept_states_of_frozen_layers_change_nothing():
    losses = []
    for kept in (True, False):
        base = nanochat_base(num_hidden_layers=4)
        wb.add_lora(base.model, wb.LoRAConfig(rank=4, num_layers=1))
        trainer, reports = trained(base, prefix_cache=kept, learning_rate=1e-2, epochs=2)
        assert trainer.prefix.used is kept
        losses.append([report.loss for report in reports])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_preferences_are_learnt():
    base = nanochat_base()
    wb.add_lora(base.model, wb.LoRAConfig(rank=4))
    _, reports = trained(base, toy_preferences(), wb.DPOConfig(), steps=12, learning_rate=3e-3)
    assert reports[0].loss == pytest.approx(np.log(2), abs=1e-5)
    assert reports[-1].loss < reports[0].loss


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    def trainer(run_dir):
        base, config = nanochat_base(), wb.TrainConfig(steps=6, micro_batch_size=2)
        return wb.Trainer(base, toy_dataset([9, 12, 7, 15]), config, run_dir=run_dir)

    whole, stopped = trainer(None), trainer(tmp_path)
    list(whole)
    for report in stopped:
        if report.step == 3:
            stopped.stop()
    resumed = trainer(tmp_path)
    assert resumed.steps_done == 3
    list(resumed)
    assert wb.fingerprint(resumed.model) == wb.fingerprint(whole.model)


# What knows our networks


def test_the_default_adapter_finds_every_layer():
    model = toy_nanochat()
    adapter = wb.add_lora(model, wb.LoRAConfig(rank=2))
    assert len(adapter.module_names) == 2 * 6
    adapter = wb.add_lora(model, wb.LoRAConfig(rank=2, target_modules=["c_q", "c_v"]))
    assert adapter.trainable == 2 * 2 * (32 + 32 + 32 + 16)
    with pytest.raises(ConfigError, match=r"\['q_proj'\] match nothing.*c_q.*c_k.*c_v.*c_fc"):
        wb.add_lora(model, wb.LoRAConfig(target_modules=["q_proj"]))


def test_its_head_alone_can_train_and_needs_no_untying():
    base = nanochat_base()
    wb.untie_head(base)
    assert wb.set_trainable(base.model, "head").names == ("lm_head.weight",)
    _, reports = trained(base, learning_rate=1e-2)
    assert reports[-1].loss < reports[0].loss


def test_check_model_finds_nothing_wrong():
    report = wb.check_model(nanochat_base())
    assert report.ok, report
    for heading in ("softcap", "loss", "cache", "position offset", "grouped heads", "head"):
        assert report.status(heading) == "ok", report


def test_check_model_sees_through_the_zeros_of_the_start():
    base = nanochat_base()
    mx.random.seed(1)
    base.model = NanoChat(base.config)
    before = wb.fingerprint(base.model)
    report = wb.check_model(base)
    assert report.ok, report
    for heading in ("causality", "position order", "position offset", "gradients", "softcap"):
        assert report.status(heading) == "ok", report
    assert "4 matrices of zeros" in str(report)
    assert wb.fingerprint(base.model) == before
    assert wb.check_model(base.model, reference=base.model).ok


class Uncapped(NanoChat):
    def head(self, hidden_states):
        return self.lm_head(hidden_states)


def test_check_model_finds_a_missing_cap():
    model = toy_nanochat()
    model.__class__ = Uncapped
    assert "softcap" in wb.check_model(model).failed_checks


def test_a_plan_is_refused_by_name():
    for config in (toy_nanochat().config, dataclasses.asdict(toy_nanochat().config)):
        with pytest.raises(ConfigError, match="memory of a 'nanochat' network cannot be predicted"):
            wb.plan_memory(config)


def test_flops_as_counted_by_hand():
    """3 rows of 10 inputs, 23 targets; 32 features, 4 heads of 8, 2 key/value heads, 96 inside."""
    model, mask = toy_nanochat(), np.zeros((3, 11), bool)
    mask.reshape(-1)[[*range(1, 11), *range(12, 22), 23, 24, 25]] = True
    batch = Batch(np.ones((3, 11), np.int32), mask, (0, 1, 2))
    attention = 2 * 30 * (32 * 32 * 2 + 32 * 16 * 2) + 4 * 3 * 4 * 10**2 * 8
    mlp, head = 2 * 2 * 32 * 96, 2 * 23 * 32 * model.config.vocab_size
    forward = 2 * attention + (30 + 23) * mlp
    assert step_flops(model, [batch]) == 3 * (forward + head)
    model.freeze()
    model.lm_head.unfreeze()
    assert step_flops(model, [batch]) == forward + 2 * head


# Export


def test_mlx_lm_reads_what_is_written_with_equal_logits(tmp_path):
    base = nanochat_base()
    plain = base.model(TOKENS)
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    base.model.update(tree_map(lambda w: w + 0.1, base.model.trainable_parameters()))
    fused = wb.fuse(base, tmp_path / "fused")
    assert fused.tools == ("mlx-lm",)
    expected = base.model(TOKENS)
    assert mx.abs(expected - plain).max() > 0.1
    assert close(of_mlx_lm(fused.path, tmp_path / "logits.npy"), expected, 1e-5)
    back = wb.load_model(fused)
    assert type(back.model) is NanoChat
    assert close(back.model(TOKENS), expected, 1e-5)


def test_a_network_made_here_is_written_whole(tmp_path):
    """One that came from no file: config.json says every dimension."""
    base = nanochat_base()
    base.raw_config = {"model_type": "nanochat"}
    wb.fuse(base, tmp_path / "fused")
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert NanoChatConfig.from_dict(written) == base.config
    assert mx.array_equal(wb.load_model(tmp_path / "fused").model(TOKENS), base.model(TOKENS))


def test_an_adapter_for_mlx_lm_is_read_back(tmp_path):
    base = nanochat_base()
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    base.model.update(tree_map(lambda w: w + 0.1, base.model.trainable_parameters()))
    wb.save_adapter(base, tmp_path / "adapter")
    other = nanochat_base()
    wb.load_adapter(other, tmp_path / "adapter")
    assert close(other.model(TOKENS), base.model(TOKENS), 1e-6)


def test_a_quantised_export_is_read_back(tmp_path):
    base = nanochat_base()
    settings = {"bits": 8, "group_size": 32}
    fused = wb.fuse(base, tmp_path / "fused", quantise=settings)
    twin = mlx_lm_twin(base.model)
    nn.quantize(twin, **settings)
    assert close(wb.load_model(fused, dtype=mx.float32).model(TOKENS), twin(TOKENS), 1e-5)


@pytest.mark.parametrize("write", [
    lambda base, place: wb.export_gguf(base, place / "nano.gguf"),
    lambda base, place: wb.save_adapter(base, place / "adapter", format="peft"),
], ids=["gguf", "peft"])  # fmt: skip
def test_formats_that_do_not_know_it_are_refused(tmp_path, write):
    base = nanochat_base()
    wb.add_lora(base.model, wb.LoRAConfig(rank=2))
    with pytest.raises(ConfigError):
        write(base, tmp_path)
