"""The profile of a step: each phase has its own time, and nothing is as if it had been made."""

from __future__ import annotations

import dataclasses
import importlib
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from mlx.utils import tree_flatten

from tests.toy import VOCAB_SIZE, toy_dataset, toy_model
from tests.toy_training import RAGGED, FailAt, computed, fail, state_of, toy_trainer
from workbench.data import batches
from workbench.data.batches import Batch
from workbench.errors import ConfigError, TrainingError
from workbench.live import profile as drawing
from workbench.live.figures import ORANGE
from workbench.models.forms import plain_forms
from workbench.models.stand_ins import StandIn
from workbench.tuning import flops, profiling
from workbench.tuning.config import TrainConfig
from workbench.tuning.flops import step_flops
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import supervised_loss
from workbench.tuning.profiling import PHASES, StepProfile, profile_step
from workbench.tuning.trainer import Trainer

SETTINGS = {"dropout": 0.2, "micro_batch_size": 3, "grad_accum_steps": 2, "epochs": 3}


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """A peak that takes no time to measure."""
    monkeypatch.setattr(profiling, "measure_matmul", lambda: 100.0)


def everything(trainer: Trainer) -> tuple:
    """Whatever a profile could leave behind."""
    weights, optimizer = state_of(trainer)
    files = {}
    if trainer.run is not None:
        folder = trainer.run.folder
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    random = mx.random.state[0].tolist()
    memory = dataclasses.asdict(trainer.progress), trainer.peak_learning_rate, trainer.stop_reason
    mode = trainer.model.training
    return weights, optimizer, random, list(trainer.reports), memory, mode, files


@pytest.mark.parametrize("made", [0, 2])
def test_nothing_is_as_if_a_step_had_been_made(tmp_path, made):
    data = toy_dataset(RAGGED, valid=[8, 9])
    trainer = toy_trainer(run_dir=tmp_path / "run", data=data, **SETTINGS)
    for _ in range(made):
        trainer.step()
    mx.random.seed(12345)
    mx.random.uniform()
    before = everything(trainer)
    profile_step(trainer, steps=2)
    assert everything(trainer) == before
    untouched = toy_trainer(data=data, **SETTINGS)
    assert list(map(computed, [*trainer.reports, *trainer])) == list(map(computed, untouched))
    assert state_of(trainer) == state_of(untouched)


def test_a_step_that_fails_leaves_nothing_behind_either():
    trainer = toy_trainer(loss_fn=FailAt(3, fail))
    before = everything(trainer)
    with pytest.raises(RuntimeError, match="planted"):
        profile_step(trainer)
    assert everything(trainer) == before
    trainer = toy_trainer(loss_fn=FailAt(2, lambda loss: loss * mx.nan))
    before = everything(trainer)
    with pytest.raises(TrainingError, match="gave loss nan"):
        profile_step(trainer)
    assert everything(trainer) == before


def test_what_is_measured_are_the_steps_that_would_be_made():
    trainer = toy_trainer(**SETTINGS)
    profile = profile_step(trainer, steps=2)
    twin = toy_trainer(**SETTINGS)
    assert profile.losses == (twin.step().loss, twin.step().loss)
    assert profile.steps == 2


@pytest.mark.parametrize("switch", ["fused_loss", "grad_checkpoint"])
def test_the_switches_for_memory_are_measured_as_they_train(switch, monkeypatch):
    settings = {**SETTINGS, switch: True}
    trainer, seen = toy_trainer(**settings), []
    own = profiling.accumulate
    monkeypatch.setattr(profiling, "accumulate", lambda *a: seen.append(a[4]) or own(*a))
    profile = profile_step(trainer, steps=1)
    assert profile.losses == (toy_trainer(**settings).step().loss,)
    assert set(seen) == {switch == "grad_checkpoint"}


def test_phases_share_the_time_that_passed():
    trainer = toy_trainer(valid=[9, 12], valid_every=2, epochs=4)
    started = time.perf_counter()
    profile = profile_step(trainer, steps=3)
    passed = time.perf_counter() - started
    assert list(profile.seconds) == list(PHASES)
    assert all(seconds > 0 for seconds in profile.seconds.values())
    assert sum(profile.share.values()) == pytest.approx(1)
    whole = profile.step_seconds + profile.seconds["evaluation"]
    assert whole == pytest.approx(sum(profile.seconds.values()))
    assert profile.step_seconds < passed


def test_without_validation_it_takes_no_time():
    assert profile_step(toy_trainer(), steps=1).seconds["evaluation"] == 0


def work() -> mx.array:
    """Zero, by a way that takes longer than a toy's step."""
    big = mx.ones((900, 900))
    return 0 * (big @ big @ big).sum()


@mx.custom_function
def slow_to_derive(x: mx.array) -> mx.array:
    return x * 1.0


@slow_to_derive.vjp
def _(primals, flow, output):
    return flow + work()


def plant_data(monkeypatch):
    collate = batches.collate
    monkeypatch.setattr(batches, "collate", lambda *a: time.sleep(0.05) or collate(*a))
    return toy_trainer()


def plant_forward(monkeypatch):
    trainer = toy_trainer()
    layer = trainer.model.layers[0]
    layer.mlp = StandIn(layer.mlp, lambda mlp, x: mlp(x) + work())
    return trainer


def plant_loss(monkeypatch):
    return toy_trainer(loss_fn=lambda model, batch: supervised_loss(model, batch) + work())


def plant_backward(monkeypatch):
    return toy_trainer(loss_fn=lambda model, batch: slow_to_derive(supervised_loss(model, batch)))


def plant_update(monkeypatch):
    trainer = toy_trainer()
    update = trainer.optimizer.update
    trainer.optimizer.update = lambda *a: time.sleep(0.05) or update(*a)
    return trainer


def plant_evaluation(monkeypatch):
    mean_loss = profiling.mean_loss
    monkeypatch.setattr(profiling, "mean_loss", lambda *a: time.sleep(0.05) or mean_loss(*a))
    return toy_trainer(valid=[9] * 4, valid_every=1)


def plant_host(monkeypatch):
    trainer = toy_trainer()
    layer = trainer.model.layers[0]
    layer.mlp = StandIn(layer.mlp, lambda mlp, x: time.sleep(0.05) or mlp(x))
    return trainer


PLANTED = {
    "data": plant_data,
    "forward": plant_forward,
    "loss": plant_loss,
    "backward": plant_backward,
    "update": plant_update,
    "evaluation": plant_evaluation,
    "host": plant_host,
}


@pytest.mark.parametrize("phase", PHASES)
def test_work_that_is_planted_in_a_phase_is_found_there(phase, monkeypatch):
    profile = profile_step(PLANTED[phase](monkeypatch), steps=3)
    assert max(profile.share, key=profile.share.get) == phase, profile
    assert profile.share[phase] > 1 / 3, profile


BATCH = Batch(  # 3 rows of 10 inputs; 5 + 8 + 10 targets are supervised
    np.ones((3, 11), np.int32), np.arange(11) >= np.array([[6], [3], [1]]), (0, 1, 2)
)
LATE = 3 * 2048  # gate, up and down of a layer: in the last one, at 23 positions
FORWARD = 2 * (2 * 30 * 9216 + 4 * 3 * 4 * 10**2 * 8) - 2 * 7 * LATE  # linear ones, attention
HEAD = 2 * 23 * 32 * VOCAB_SIZE


def test_flops_of_an_adapter_on_the_last_layers_queries_as_counted_by_hand():
    model = toy_model()
    add_lora(model, LoRAConfig(rank=4, target_modules="q_proj", num_layers=1))
    adapter = 2 * 30 * 32 * 4  # one of its two products
    forward = FORWARD + HEAD + 2 * adapter
    # Gradients of: lora_a; lora_b and what enters it; the queries, and the attention's weights;
    # what enters o, gate, up and down; what enters the head.
    attention = 2 * (2 * 3 * 4 * 10**2 * 8)
    backward = 3 * adapter + attention + 2 * 30 * 1024 + 2 * 23 * LATE + HEAD
    assert step_flops(model, [BATCH]) == forward + backward
    assert step_flops(model, [BATCH, BATCH]) == 2 * (forward + backward)
    below = 2 * 30 * 9216 + 4 * 3 * 4 * 10**2 * 8
    assert step_flops(model, [BATCH], first_layer=1) == forward + backward - below


@pytest.mark.parametrize("tied", [True, False])
def test_full_training_takes_three_times_the_forward_pass(tied):
    model = toy_model(tie_word_embeddings=tied)
    assert step_flops(model, [BATCH]) == 3 * (FORWARD + HEAD)


def test_the_head_alone_costs_what_enters_it_and_its_weights():
    model = toy_model(tie_word_embeddings=False)
    model.freeze()
    model.lm_head.unfreeze()
    assert step_flops(model, [BATCH], first_layer=2) == 2 * HEAD
    model.model.norm.unfreeze()
    assert step_flops(model, [BATCH], first_layer=2) == 3 * HEAD
    assert step_flops(model, [BATCH]) == FORWARD + 3 * HEAD


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["v_proj"], "all-linear", None])
def test_as_many_products_are_counted_as_mlx_computes(targets, tmp_path, monkeypatch):
    model, counted = toy_model(), []
    if targets:
        add_lora(model, LoRAConfig(rank=4, target_modules=targets, num_layers=1))
    with plain_forms():
        loss, gradients = nn.value_and_grad(model, supervised_loss)(model, BATCH)
    graph = tmp_path / "graph.dot"
    mx.export_to_dot(str(graph), loss, *[g for _, g in tree_flatten(gradients)])
    add = lambda products, flops, *grow: counted.append(1 + sum(map(bool, grow)))  # noqa: E731
    monkeypatch.setattr(flops._Products, "add", add)
    step_flops(model, [BATCH])
    assert sum(counted) == graph.read_text().count('"Matmul"')


def test_what_rows_share_is_counted_once():
    model = toy_model()
    tokens = np.ones((3, 11), np.int32)
    tokens[:, 4:] = np.arange(21).reshape(3, 7)  # 4 tokens are shared
    batch = Batch(tokens, BATCH.loss_mask, (0, 1, 2))
    positions, squares = 4 + 3 * 6, 4**2 + 3 * 6 * 10
    forward = 2 * positions * (9216 - LATE) + 2 * 23 * LATE + 4 * 4 * squares * 8
    forward += 2 * positions * 9216 + 4 * 4 * squares * 8 + HEAD
    assert step_flops(model, [batch], shared=True) == 3 * forward
    assert step_flops(model, [batch]) == 3 * (FORWARD + HEAD)


def test_the_floor_is_the_flops_at_the_peak():
    profile = dataclasses.replace(FIXED, flops=3 * 10**9, peak_gflops=100.0)
    assert profile.floor_seconds == pytest.approx(0.03)
    assert profile.step_seconds == pytest.approx(0.21)
    assert profile.peak_share == pytest.approx(0.03 / 0.21)
    twice = dataclasses.replace(profile, peak_gflops=200.0)
    assert twice.peak_share == pytest.approx(profile.peak_share / 2)


def test_a_kept_prefix_is_named_and_not_counted():
    base = toy_trainer().base
    add_lora(base.model, LoRAConfig(rank=4, num_layers=1))
    config = TrainConfig(micro_batch_size=4, epochs=2)
    profiles = [
        profile_step(Trainer(base, toy_dataset(RAGGED), settings), steps=1)
        for settings in (config, dataclasses.replace(config, prefix_cache=False))
    ]
    assert "prefix cache on" in str(profiles[0])
    assert "prefix cache" not in str(profiles[1])
    assert profiles[0].flops < profiles[1].flops
    assert profiles[0].losses == pytest.approx(profiles[1].losses, rel=1e-6)


def test_a_foreign_model_is_profiled_without_a_share_of_the_peak():
    llama = importlib.import_module("mlx_lm.models.llama")
    base = toy_trainer().base
    base.model = llama.Model(llama.ModelArgs.from_dict(base.raw_config))
    add_lora(base.model, LoRAConfig(rank=4))
    profile = profile_step(Trainer(base, toy_dataset(RAGGED), TrainConfig()), steps=1)
    assert profile.seconds["loss"] == 0 < profile.seconds["forward"]
    assert profile.flops is profile.floor_seconds is profile.peak_share is None
    assert "does not part into backbone and head" in str(profile)
    assert "products of a Model are not known" in str(profile)


def test_steps_must_be_a_whole_number():
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="steps"):
            profile_step(toy_trainer(), steps=steps)


FIXED = StepProfile(
    "<b>toy</b>",
    dict(zip(PHASES, (0.01, 0.05, 0.03, 0.08, 0.02, 0.04, 0.02))),
    steps=3,
    losses=(1.0, 0.9, 0.8),
    flops=2 * 10**9,
    peak_gflops=100.0,
    notes=("a & b",),
)


def test_table_text_and_html_say_the_same():
    table = FIXED.table()
    assert list(table["phase"]) == list(PHASES)
    assert table["time (ms)"].sum() == pytest.approx(250)
    assert table["share (%)"].sum() == pytest.approx(100)
    text, page = str(FIXED), FIXED._repr_html_()
    for phase, seconds in FIXED.seconds.items():
        assert phase in text
        assert phase in page
        assert f"{1000 * seconds:.2f}" in text
        assert f"{1000 * seconds:.2f}" in page
    assert "10 % of the 100 GFLOP/s" in text
    assert "<b>toy" not in page
    assert "&lt;b&gt;toy" in page
    assert "a &amp; b" in page


def test_every_phase_has_its_bar_and_the_floor_its_own(monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "png", lambda figure: drawn.append(figure) or b"")
    drawing.draw_profile(FIXED)
    drawing.draw_profile(dataclasses.replace(FIXED, flops=None))
    axes = drawn[0].axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([10, 50, 30, 80, 20, 40, 20, 20])
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == [*PHASES, "matmul floor"]
    assert [bar.get_facecolor() == to_rgba(ORANGE) for bar in axes.patches] == [False] * 7 + [True]
    assert drawn[0].get_suptitle().startswith("Backward takes 32 % of the time; the step reaches")
    assert len(drawn[1].axes[0].patches) == len(PHASES)
    assert "peak" not in drawn[1].get_suptitle()
