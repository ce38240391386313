"""The checks catch every known bug under its heading, and raise no false alarm."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
import pytest
from mlx.utils import tree_flatten

from tests.architectures import ARCHITECTURES
from tests.mutant import BUGS, mutant_table
from tests.mutants_attention import interleaved_rope, interleaved_weights
from tests.mutants_model import CORRECT, MUTANTS
from tests.mutants_training import CORRECT as CORRECT_TRAINING
from tests.mutants_training import MUTANTS as TRAINING_MUTANTS
from tests.toy import toy_base, toy_model
from workbench.errors import ConfigError
from workbench.models.files import write_safetensors
from workbench.models.loading import BaseModel
from workbench.probes.invariants import CHECKS, check_model
from workbench.probes.parameters import fingerprint
from workbench.tuning.lora import LoRAConfig, add_lora

LEFT_OUT = [heading for heading in CHECKS if heading not in ("text", "tokenizer")]
ALL_CORRECT = [*CORRECT, *CORRECT_TRAINING]


def test_every_mutant_is_caught_under_its_heading(record_property):
    mutants = sorted((*MUTANTS, *TRAINING_MUTANTS), key=lambda mutant: mutant.bug)
    reports = [mutant.run() for mutant in mutants]
    table = mutant_table(mutants, reports)
    with pd.option_context("display.width", 200, "display.max_colwidth", 60):
        shown = table.drop(columns="what it says").to_string(index=False)
    caught = f"{table['caught'].sum()} of {len(table)} broken models and trainings caught"
    record_property(caught, shown)
    assert len(table) >= 30
    assert {mutant.bug for mutant in mutants} == set(BUGS)
    assert table["caught"].all(), table[~table["caught"]].to_string()
    for mutant, report in zip(mutants, reports):
        assert all(finding.detail and finding.cause for finding in report.failures), mutant.name


@pytest.mark.parametrize(("name", "run"), ALL_CORRECT, ids=[name for name, _ in ALL_CORRECT])
def test_no_false_alarm_on_what_is_right(name, run):
    report = run()
    assert report.ok, report


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_false_alarm_on_mlx_lm(name):
    report = check_model(ARCHITECTURES[name].build())
    assert report.ok, report
    assert report.status("causality") == report.status("batch") == "ok"


def test_the_model_is_left_as_it_was():
    model = toy_model()
    model.train()
    model.layers[0].eval()
    model.model.norm.weight = model.model.norm.weight.astype(mx.bfloat16)
    add_lora(model, LoRAConfig(rank=2))
    before, names = (
        fingerprint(model),
        [name for name, _ in tree_flatten(model.trainable_parameters())],
    )
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    modes = [module.training for module in model.modules()]
    assert check_model(model).ok
    assert fingerprint(model) == before
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == names
    assert [(path, type(module)) for path, module in model.named_modules()] == kinds
    assert [module.training for module in model.modules()] == modes


def test_a_loaded_model_brings_its_report_and_tokenizer():
    report = check_model(toy_base())
    assert report.status("weights") == report.status("tokenizer") == "ok"


def test_saved_logits_serve_as_reference(tmp_path):
    model = toy_model()
    tokens = mx.array([[4, 5, 6, 7]])
    saved = {"tokens": tokens, "logits": model(tokens)}
    write_safetensors(tmp_path / "logits.safetensors", saved)
    for reference in (tmp_path / "logits.safetensors", (saved["tokens"], saved["logits"])):
        assert check_model(model, reference=reference).status("reference") == "ok"
        assert "reference" in check_model(interleaved_rope(), reference=reference).failed_checks
    for bad in (3, (tokens,), (tokens, mx.zeros((1, 2, 3)))):
        with pytest.raises(ConfigError, match="tokens"):
            check_model(model, reference=bad)


def test_the_first_module_that_departs_is_named():
    model = toy_model()
    model.layers[1].mlp.up_proj.weight = model.layers[1].mlp.up_proj.weight * 1.01
    (finding,) = check_model(model, reference=toy_model()).failures
    assert "model.layers.1.mlp.up_proj" in finding.detail
    assert "weights" in finding.cause
    (finding,) = check_model(interleaved_rope(), reference=toy_model()).failures
    assert "model.layers.0.self_attn" in finding.detail
    assert "RoPE" in finding.cause


class Embedded(nn.Module):
    """A user's own port, with other names: no cache, one attention over learned positions."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(50, 16)
        self.pos_emb = nn.Embedding(64, 16)
        self.attention = nn.MultiHeadAttention(16, 2)
        self.out = nn.Linear(16, 50, bias=False)

    def __call__(self, x):
        h = self.tok(x) + self.pos_emb(mx.arange(x.shape[1]))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1])
        return self.out(h + self.attention(h, h, h, mask))


def test_a_users_own_port_is_told_apart():
    mx.random.seed(0)
    report = check_model(Embedded())
    assert report.ok, report
    assert report.status("position order") == "ok"
    for heading in ("cache", "position offset", "relative position"):
        assert report.status(heading) == "not applicable", heading


class NoPositions(Embedded):
    def __call__(self, x):
        self.pos_emb.weight = self.pos_emb.weight * 0
        return super().__call__(x)


def test_positions_that_never_reach_attention_are_found():
    mx.random.seed(0)
    assert "position order" in check_model(NoPositions()).failed_checks


class BareEmbedding(nn.Module):
    """No embedding module, no config: nothing tells the vocabulary but the logits."""

    def __init__(self):
        super().__init__()
        self.table = mx.random.normal((40, 16))
        self.attention = nn.MultiHeadAttention(16, 2)

    def __call__(self, x):
        h = self.table[x]
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1])
        return (h + self.attention(h, h, h, mask)) @ self.table.T


def test_without_an_embedding_the_logits_tell_the_vocabulary():
    mx.random.seed(0)
    report = check_model(BareEmbedding())
    assert report.failed_checks == {"position order"}
    assert "40" in report.findings[0].detail


@pytest.mark.parametrize("name", ["phi3", "internlm2", "dbrx", "openelm"])
def test_tiled_heads_are_found_behind_a_fused_projection(name, monkeypatch):
    model = ARCHITECTURES[name].build()
    module = sys.modules[type(model).__module__]
    plain = module.scaled_dot_product_attention

    def tiled(queries, keys, values, cache, scale, mask):
        repeats = queries.shape[1] // keys.shape[1]
        keys, values = (mx.tile(x, (1, repeats, 1, 1)) for x in (keys, values))
        return plain(queries, keys, values, cache=cache, scale=scale, mask=mask)

    monkeypatch.setattr(module, "scaled_dot_product_attention", tiled)
    assert check_model(model).failed_checks == {"grouped heads"}


def test_quantised_models_are_checked_as_they_are():
    model = toy_model(hidden_size=64)
    nn.quantize(model, group_size=32, bits=8)
    report = check_model(model)
    assert report.ok, report
    assert report.status("gradients") == "not applicable"


@pytest.mark.real
def test_trained_weights_pass_and_show_a_wrong_rope_layout(smollm2: BaseModel):
    assert check_model(smollm2).ok
    original = smollm2.model.parameters()
    try:
        interleaved_weights(smollm2.model)
        report = check_model(smollm2, skip=LEFT_OUT)
    finally:
        smollm2.model.update(original)
    assert report.failed_checks == {"RoPE layout"}
    assert np.isfinite(report.seconds)
