"""What leaves the frozen layers is kept: the same training, with those layers run once a row."""

from __future__ import annotations

import dataclasses
import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.toy import save_toy_folder, toy_base, toy_dataset, toy_examples
from tests.toy_training import RAGGED, computed, state_of, trained
from workbench.data.batches import collate
from workbench.data.datasets import Dataset
from workbench.errors import ConfigError, FallbackWarning
from workbench.models.loading import load_model
from workbench.models.stand_ins import intercepted
from workbench.models.structure import module_at
from workbench.probes import parameters
from workbench.probes.training import check_training
from workbench.tuning import prefix_cache
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import default_loss, mean_loss, supervised_loss
from workbench.tuning.prefix import first_layer
from workbench.tuning.prefix_cache import PrefixCache, PrefixLoss
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import accumulate

LAYERS = 4
KINDS = ("last 2 layers", "last layer, dropout", "head", "head, untied")


def toy(kind: str = "last 2 layers", seed: int = 0, **changes):
    """A toy base with a frozen part, and the first layer that must run at every step."""
    untied = {"tie_word_embeddings": False} if kind == "head, untied" else {}
    base = toy_base(seed, num_hidden_layers=LAYERS, **untied, **changes)
    if not kind.startswith("head"):
        count, dropout = (1, 0.3) if "dropout" in kind else (2, 0.0)
        add_lora(base.model, LoRAConfig(rank=4, num_layers=count, dropout=dropout))
        for _, module in base.model.named_modules():  # so that lora_a has a gradient
            if "lora_b" in module:
                module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
        return base, LAYERS - count
    base.model.freeze()
    base.model.model.norm.unfreeze()
    if untied:
        base.model.lm_head.unfreeze()
    return base, LAYERS


def trainer_of(base, *, data=None, **settings) -> Trainer:
    """A trainer of two epochs; the prefix cache is asked for unless the settings say else."""
    kept = {k: settings.pop(k) for k in ("run_dir", "loss_fn") if k in settings}
    given = {"micro_batch_size": 3, "learning_rate": 1e-2, "epochs": 2, "prefix_cache": True}
    return Trainer(base, data or toy_dataset(RAGGED), TrainConfig(**{**given, **settings}), **kept)


def loss_and_gradients(model: nn.Module, loss_fn, batch) -> tuple[float, dict[str, np.ndarray]]:
    loss, gradients = accumulate(model, loss_fn, [batch], seed=3)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layer_that_trains_is_found(kind):
    base, first = toy(kind)
    assert first_layer(base.model) == (first, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_gives_loss_and_gradients_to_the_bit(kind):
    base, first = toy(kind)
    loss_fn = PrefixLoss(PrefixCache(base.model, first, 10**9), supervised_loss)
    for example in toy_examples(RAGGED):
        batch = collate([example], [0])
        for _ in range(2):  # once computed, once read
            loss, gradients = loss_and_gradients(base.model, loss_fn, batch)
            plain_loss, plain = loss_and_gradients(base.model, supervised_loss, batch)
            assert loss == plain_loss
            assert gradients.keys() == plain.keys()
            assert all(np.array_equal(gradients[name], plain[name]) for name in plain)
            assert any(gradient.any() for gradient in plain.values())
    assert loss_fn.cache.hits == loss_fn.cache.misses == len(RAGGED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_loss_and_gradients_but_for_rounding(kind):
    # Products of another height are added up in another order.
    base, first = toy(kind)
    loss_fn = PrefixLoss(PrefixCache(base.model, first, 10**9), supervised_loss)
    batch = collate(toy_examples(RAGGED), range(len(RAGGED)))
    loss, gradients = loss_and_gradients(base.model, loss_fn, batch)
    plain_loss, plain = loss_and_gradients(base.model, supervised_loss, batch)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        bound = 1e-5 * np.abs(gradient).max()
        assert np.abs(gradients[name] - gradient).max() <= bound, name


def assert_alike(runs):
    """Two runs: (reports, trainable tensors by name) of each, equal but for rounding."""
    (reports, weights), (others, other_weights) = runs
    for report, other in zip(reports, others, strict=True):
        assert report.loss == pytest.approx(other.loss, rel=1e-5)
        assert (report.valid_loss is None) == (other.valid_loss is None)
        assert (report.valid_loss or 0) == pytest.approx(other.valid_loss or 0, rel=1e-5)
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert np.abs(weight - other_weights[name]).max() <= 1e-4 * np.abs(weight).max(), name


def weights_of(trainer):
    return {n: np.array(a) for n, a in tree_flatten(trainer.model.trainable_parameters())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switches", [{}, {"fused_loss": False}, {"grad_checkpoint": True}])
def test_a_run_is_the_plain_run_but_for_rounding(kind, switches):
    data = toy_dataset([5, 9, 12, 14], valid=[7, 10])
    runs = []
    for asked in (True, False):
        settings = {"micro_batch_size": 2, "valid_every": 2, "adam_epsilon": 1e-3, **switches}
        trainer = trainer_of(toy(kind)[0], data=data, prefix_cache=asked, **settings)
        assert trainer.prefix.used is asked
        runs.append((list(trainer), weights_of(trainer)))
    assert_alike(runs)


def test_frozen_layers_run_once_for_all_rows_of_a_group():
    base, _ = toy()
    trainer, calls = trainer_of(base, epochs=3), {0: 0, LAYERS - 1: 0}

    def counting(number):
        def call(layer, *args, **kwargs):
            calls[number] += 1
            return layer(*args, **kwargs)

        return call

    with intercepted(base.model, {f"model.layers.{number}": counting(number) for number in calls}):
        list(trainer)
    assert calls == {0: 1, LAYERS - 1: trainer.total_steps}
    cache = trainer.prefix.cache
    assert (cache.misses, cache.hits) == (len(RAGGED), 3 * len(RAGGED) - 1)
    assert cache.held_bytes == trainer.prefix.needed_bytes == 4 * 32 * sum(n - 1 for n in RAGGED)


def test_rows_of_like_length_make_a_group_whatever_their_order(monkeypatch):
    monkeypatch.setattr(prefix_cache, "GROUP_POSITIONS", 30)
    examples = toy_examples([14, 6, 30, 12, 9, 16, 40])
    groups = prefix_cache._groups(examples)
    assert [[len(row) for row in group] for group in groups] == [[5, 8], [11, 13], [15], [29], [39]]
    again = prefix_cache._groups([*reversed(examples), examples[2]])
    for group, other in zip(groups, again, strict=True):
        assert all(np.array_equal(row, same) for row, same in zip(group, other, strict=True))


def test_weights_that_stay_are_hashed_once(monkeypatch):
    hashed, own = [], parameters.digest
    monkeypatch.setattr(
        parameters, "digest", lambda array: hashed.append(array.shape) or own(array)
    )
    trainer = trainer_of(toy()[0], data=toy_dataset(RAGGED, valid=[9, 14]), valid_every=2)
    below = 1 + 2 * 9  # the embedding, and two layers of nine tensors
    assert len(hashed) == below
    list(trainer)
    assert len(hashed) == below


@pytest.mark.parametrize("in_groups", [True, False])
def test_kept_states_do_not_depend_on_the_batch_that_computed_them(in_groups):
    base, first = toy()
    examples, orders = toy_examples(RAGGED), ([[0, 1, 2], [3, 4]], [[1, 4], [3, 0], [2]])
    kept = []
    for order in orders:
        cache = PrefixCache(base.model, first, 10**9, examples if in_groups else ())
        for rows in order:
            cache.states(collate(examples, rows))
        kept.append(np.array(cache.states(collate(examples, range(5)))))
    assert np.array_equal(*kept)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = toy_dataset(RAGGED, valid=[9, 14])
    settings = {"data": data, "epochs": 3, "valid_every": 4}
    kind = "last layer, dropout"
    whole = trainer_of(toy(kind)[0], **settings)
    list(whole)
    for report in trainer_of(toy(kind)[0], run_dir=tmp_path, **settings):
        if report.step == 4:
            break
    resumed = trainer_of(toy(kind)[0], run_dir=tmp_path, **settings)
    assert resumed.steps_done == 4
    list(resumed)
    assert list(map(computed, resumed.reports)) == list(map(computed, whole.reports))
    assert state_of(resumed) == state_of(whole)


def test_a_reloaded_run_keeps_its_states_and_is_the_same_to_the_bit(tmp_path):
    folder = save_toy_folder(tmp_path / "model", num_hidden_layers=LAYERS)
    runs = []
    for settings in ({}, {"reload_every": 2, "run_dir": tmp_path / "run"}):
        base = load_model(folder)
        add_lora(base.model, LoRAConfig(rank=4, num_layers=1, dropout=0.2))
        trainer = trainer_of(base, **settings)
        losses = [report.loss for report in trainer]
        runs.append((losses, state_of(trainer), trainer.prefix.cache.misses))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_rows_beyond_the_bound_are_computed_anew_with_the_same_result(share):
    whole = trainer_of(toy()[0])
    limit = int(share * whole.prefix.needed_bytes)
    with pytest.warns(FallbackWarning, match="at every step"):
        bounded = trainer_of(toy()[0], prefix_cache_bytes=limit)
    assert_alike([(list(trainer), weights_of(trainer)) for trainer in (bounded, whole)])
    assert bounded.prefix.cache.held_bytes <= limit
    assert bounded.prefix.cache.hits < whole.prefix.cache.hits


def test_other_weights_below_the_cache_are_never_mixed_with_kept_states():
    base, first = toy()
    other = toy(seed=5)[0]
    cache = PrefixCache(base.model, first, 10**9)
    loss_fn, batch = PrefixLoss(cache, supervised_loss), collate(toy_examples([9]), [0])
    before, key = loss_and_gradients(base.model, loss_fn, batch), cache.key
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(tree_flatten(other.model.parameters()))[name]
    base.model.update(tree_unflatten([(name, weight)]))
    after = loss_and_gradients(base.model, loss_fn, batch)
    assert cache.key != key
    assert after[0] != before[0]
    assert after[0] == loss_and_gradients(base.model, supervised_loss, batch)[0]


def test_weights_that_were_read_again_keep_the_states():
    base, first = toy()
    cache, batch = PrefixCache(base.model, first, 10**9), collate(toy_examples([9, 12]), [0, 1])
    cache.states(batch)
    held, key = cache.held_bytes, cache.key
    copies = [(name, mx.array(np.array(a))) for name, a in tree_flatten(base.model.parameters())]
    base.model.update(tree_unflatten(copies))
    cache.states(batch)
    assert (cache.key, cache.held_bytes, cache.misses) == (key, held, 2)


def test_what_trains_is_no_part_of_the_key_and_what_is_frozen_is():
    base, first = toy()
    key = PrefixCache(base.model, first, 0).key
    module_at(base.model, "model.layers.3.self_attn.q_proj").lora_b += 1
    assert PrefixCache(base.model, first, 0).key == key
    assert PrefixCache(base.model, first - 1, 0).key != key
    assert PrefixCache(toy(seed=5)[0].model, first, 0).key != key


def test_other_tokens_are_other_rows():
    base, first = toy()
    cache, example = PrefixCache(base.model, first, 10**9), toy_examples([9])[0]
    tokens = example.tokens.copy()
    tokens[3] += 1 if tokens[3] < 200 else -1
    changed = dataclasses.replace(example, tokens=tokens)
    states = [np.array(cache.states(collate([row], [0]))) for row in (example, changed)]
    assert cache.misses == 2
    assert np.array_equal(states[0][:, :3], states[1][:, :3])
    assert not np.array_equal(states[0][:, 3:], states[1][:, 3:])


def test_rows_of_the_same_tokens_are_computed_once():
    base, first = toy()
    cache, example = PrefixCache(base.model, first, 10**9), toy_examples([9])[0]
    cache.states(collate([example, example], [0, 1]))
    assert (cache.misses, cache.hits) == (1, 1)


def test_validation_uses_the_states_and_says_the_same():
    base, _ = toy()
    data = toy_dataset(RAGGED, valid=[6, 11, 8])
    trainer = trainer_of(base, data=data)
    list(trainer)
    misses = trainer.prefix.cache.misses
    assert misses == len(RAGGED) + 3
    plain = mean_loss(base.model, data.valid, 3, default_loss(base.model))
    assert trainer.validate() == pytest.approx(plain, rel=1e-6)
    assert trainer.prefix.cache.misses == misses


def test_half_precision_states_come_back_as_they_were():
    base, first = toy()
    base.model.set_dtype(mx.bfloat16)
    cache, batch = PrefixCache(base.model, first, 10**9), collate(toy_examples([9]), [0])
    states = cache.states(batch)
    inputs = base.model.embed(mx.array(batch.tokens[:, :-1]))
    assert states.dtype == mx.bfloat16
    assert mx.array_equal(states, base.model.run_layers(inputs, end=first))
    assert cache.held_bytes == states.nbytes


def test_nothing_is_left_on_the_model():
    base, _ = toy()
    before, names = dict(vars(base.model)), set(dict(tree_flatten(base.model.parameters())))
    list(trainer_of(base))
    assert vars(base.model).keys() == before.keys()
    assert set(dict(tree_flatten(base.model.parameters()))) == names


def test_another_model_runs_whole_so_that_a_check_can_look_inside():
    base, _ = toy()
    trainer = trainer_of(base)
    batch = collate(trainer.data.train, [0, 1, 2])
    other = toy(seed=5)[0].model
    assert trainer.loss_fn(other, batch).item() == supervised_loss(other, batch).item()
    report = check_training(base.model, trainer.loss_fn, batch)
    assert report.ok, report


def frozen_adapter_below(base):
    add_lora(base.model, LoRAConfig(rank=4))
    for layer in base.model.layers[:2]:
        layer.freeze()


def dropout_below(base):
    layer = base.model.layers[0]
    layer.mlp.gate_proj = nn.Sequential(layer.mlp.gate_proj, nn.Dropout(0.1))
    layer.freeze()


def trained_embedding(base):
    base.model.model.embed_tokens.unfreeze()


REFUSED = {
    "the first layer trains": lambda base: add_lora(base.model, LoRAConfig(rank=4)),
    "embed_tokens.weight trains": trained_embedding,
    "belongs to an adapter below layer 2": frozen_adapter_below,
    "drops out below layer 2": dropout_below,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_prefix_that_is_not_frozen_is_not_kept(reason):
    base, _ = toy()
    REFUSED[reason](base)
    with pytest.warns(FallbackWarning, match=reason):
        asked = trainer_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_open = trainer_of(base, prefix_cache=None)
    for trainer in (asked, left_open):
        assert not trainer.prefix.used
        assert reason in str(trainer.prefix)
        assert not isinstance(trainer.loss_fn, PrefixLoss)


def test_a_callers_own_loss_sees_the_whole_model():
    def own(model, batch):
        return supervised_loss(model, batch)

    with pytest.warns(FallbackWarning, match="caller's own"):
        trainer = trainer_of(toy()[0], loss_fn=own)
    assert trainer.loss_fn is own
    assert not trainer.prefix.used


def test_left_open_it_is_used_where_it_pays():
    def decided(data=None, **settings):
        trainer = trainer_of(toy()[0], data=data, prefix_cache=None, **settings)
        return trainer.prefix.used

    assert decided()
    assert not decided(epochs=1)
    assert not decided(steps=2)
    assert not decided(prefix_cache_bytes=1000)
    row = toy_examples([9])
    assert decided(data=Dataset("repeated", row * 6), epochs=1)
    assert not trainer_of(toy()[0], prefix_cache=False).prefix.used


@pytest.mark.parametrize(
    "setting", [{"prefix_cache": 1}, {"prefix_cache": "yes"}, {"prefix_cache_bytes": -1}]
)
def test_a_bad_setting_is_refused_by_name(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        TrainConfig(**setting)


def test_the_run_says_whether_it_was_used(tmp_path):
    for asked, word in ((True, "prefix cache on"), (False, "prefix cache off")):
        trainer_of(toy()[0], run_dir=tmp_path / str(asked), prefix_cache=asked)
        text = json.loads((tmp_path / str(asked) / "config.json").read_text())["prefix"]
        assert text.startswith(word)


def test_training_moves_what_trains_and_nothing_else():
    base, _ = toy()
    trainer = trainer_of(base)
    before, everything = trained(trainer), state_of(trainer)[0]
    list(trainer)
    after, moved = trained(trainer), state_of(trainer)[0]
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert {name for name in moved if moved[name] != everything[name]} == set(before)
