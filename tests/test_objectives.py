"""Objectives as sums of terms: the provenance loss by hand, what it reaches, what it leaves."""

import dataclasses
import json
import math
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.mutants_updates import confidence
from tests.toy import toy_base, toy_dataset, toy_examples
from tests.toy_preferences import toy_preferences
from tests.toy_provenance import (
    LENGTHS,
    PROVENANCE,
    provenance_trainer,
    toy_documents,
    with_provenance,
)
from tests.toy_streams import toy_stream, write_files
from tests.toy_training import computed, state_of, toy_trainer, trained
from workbench.data.batches import collate
from workbench.errors import ConfigError, DataError, FallbackWarning, ObjectiveWarning, RunError
from workbench.live.history import History
from workbench.live.run_chart import RunChart
from workbench.probes.training import check_training
from workbench.runs.store import read_metrics
from workbench.tuning.config import TrainConfig
from workbench.tuning.dpo import DPOConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.losses import mean_loss, plain_loss
from workbench.tuning.objectives import loss_terms, terms_of
from workbench.tuning.profiling import profile_step
from workbench.tuning.provenance import (
    ProvenanceConfig,
    ProvenanceObjective,
    automatic_weight,
    squared_distances,
)
from workbench.tuning.terms import Term, num_rows
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import differentiate

BY_HAND = {  # (w, H): (ln(1 − w + 1e-8) + H)²
    (0.5, 3.0): (3 - 0.69314716) ** 2,
    (0.0, 0.0): 1e-16,
    (0.99, 0.0): 4.60516919**2,
    (0.9, 2.302585): 0.0,
    (0.0, 7.0): 49.0,
    (0.3, 1.5): (1.5 - 0.35667493) ** 2,
}
KINDS = ("additive", "weighted")


def row_losses(model, examples):
    """(Σ CE of each row by itself, number of its targets), by the readable form of the loss."""
    batches = [collate(examples, [row]) for row in range(len(examples))]
    return [(plain_loss(model, batch).item(), batch.num_tokens) for batch in batches]


def norm_of(gradients):
    return math.sqrt(sum(np.square(np.array(g)).sum() for _, g in tree_flatten(gradients)))


@pytest.mark.parametrize(("given", "square"), BY_HAND.items())
def test_the_formula_has_the_values_of_a_hand_count(given, square):
    found = squared_distances(*(np.array([value]) for value in given))
    assert found.dtype == np.float64
    assert found.item() == pytest.approx(square, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((1.0, 1.0), r"row 1: authority_weight 1\.0 is not in \[0, 0\.99\]"),
        ((-0.01, 1.0), r"authority_weight -0\.01 is not"),
        ((math.nan, 1.0), "authority_weight nan"),
        ((0.5, -0.1), r"row 1: provenance_entropy -0\.1 is not in \[0, inf\]"),
        ((0.5, math.inf), "provenance_entropy inf"),
        ((0.5, math.nan), "provenance_entropy nan"),
    ],
)
def test_values_out_of_range_are_refused(given, says):
    with pytest.raises(DataError, match=says):
        squared_distances(*(np.array([0.5, value]) for value in given))


@pytest.mark.parametrize(
    ("losses", "weight"),
    [
        ([100.0] * 100, 0.05),
        ([10.0] * 50 + [40.0] * 50 + [1e9] * 10, 0.2),  # the first 100 count
        ([8.0, 12.0], 0.5),
        ([4.9], 1.0),
        ([0.0, 0.0], 1.0),
        ([6e3], 0.001),
    ],
)
def test_an_automatic_weight_brings_the_mean_to_five_within_its_limits(losses, weight):
    assert automatic_weight(np.array(losses)) == pytest.approx(weight)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "subtractive"}, "unknown kind 'subtractive'"),
        ({"alpha": 2.2999}, r"alpha is 2\.2999, outside \[2\.3, 3\].*force_alpha"),
        ({"alpha": 3.0001}, "outside"),
        ({"alpha": 0, "force_alpha": True}, "outside"),
        ({"alpha": -2.7, "force_alpha": True}, "alpha must be a number"),
        ({"alpha": math.nan}, "alpha must be a number"),
        ({"alpha": "2.7"}, "alpha must be a number"),
        ({"weight": "automatic"}, "weight must be a number"),
        ({"weight": -0.1}, "weight must be a number"),
        ({"weight": True}, "weight must be a number"),
        ({"kind": "weighted", "weight": 0.1}, "the kind weighted has no weight"),
        ({"force_alpha": 1}, "force_alpha must be True or False"),
        ({"weight": 1e300}, r"weight must be at most 1e\+30, got 1e\+300"),
        ({"alpha": 1e39, "force_alpha": True}, r"alpha must be at most 1e\+30"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        ProvenanceConfig(**settings)


def test_alpha_may_be_forced_and_its_limits_are_allowed():
    assert ProvenanceConfig(alpha=9.5, force_alpha=True).alpha == 9.5
    assert [ProvenanceConfig(alpha=alpha).alpha for alpha in (2.3, 2.7, 3)] == [2.3, 2.7, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"authority_weight": None}, "toy row 4: has no 'authority_weight'"),
        ({"provenance_entropy": None}, "toy row 4: has no 'provenance_entropy'"),
        ({"authority_weight": 0.991}, "toy row 4: 'authority_weight' must be a number from 0"),
        ({"provenance_entropy": -1.0}, "toy row 4: 'provenance_entropy' must be"),
        ({"provenance_entropy": math.nan}, "toy row 4: 'provenance_entropy' must be"),
        ({"provenance_entropy": "3"}, "toy row 4: 'provenance_entropy' must be"),
        ({"provenance_entropy": 1e30}, "toy row 4: its provenance loss .* too large"),
    ],
)
def test_a_bad_row_is_named_before_anything_trains(kind, changes, says):
    data = toy_documents()
    data.train[4] = dataclasses.replace(data.train[4], **changes)
    with pytest.raises(DataError, match=says):
        provenance_trainer(kind, data=data)


def test_rows_that_all_weigh_nothing_are_refused():
    balanced = 0.5, -math.log(1 - 0.5 + 1e-8)
    rows = with_provenance(toy_examples([5, 6]), [balanced] * 2)
    with pytest.raises(DataError, match="every row has H = "):
        ProvenanceObjective(ProvenanceConfig("weighted"), rows)
    with pytest.raises(DataError, match=r"looks at all training rows .* there are none"):
        ProvenanceObjective(ProvenanceConfig(), [])
    silent = ProvenanceObjective(ProvenanceConfig("additive"), rows)
    assert silent.config.weight == 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": {"dropout": 0.3}},
        {"micro_batch_size": 2, "grad_accum_steps": 2},
        {"max_grad_norm": 0.01, "grad_checkpoint": True},
        {"lora": {"num_layers": 1}, "prefix_cache": True},
        {"valid": (8, 11), "valid_every": 1},
    ],
)
def test_the_additive_term_moves_no_bit_of_any_parameter(settings):
    plain, additive = (
        provenance_trainer(kind, epochs=4, **settings) for kind in (None, "additive")
    )
    for one, other in zip(list(plain), list(additive), strict=True):
        assert other.extras["provenance"] > 0.5
        assert other.extras["provenance_grad_norm"] == 0.0
        assert other.extras["cross_entropy"] == other.loss == one.loss
        assert other.extras["cross_entropy_grad_norm"] == other.grad_norm == one.grad_norm
        assert other.valid_loss == one.valid_loss
        assert one.extras is None
    assert state_of(additive) == state_of(plain)


def test_the_additive_term_is_the_mean_over_the_rows_of_a_step():
    values = [2.7 * (math.log(1 - w + 1e-8) + entropy) ** 2 for w, entropy in PROVENANCE]
    weight = 5 / np.mean(values)
    whole = provenance_trainer("additive", micro_batch_size=6)
    parts = provenance_trainer("additive", micro_batch_size=4, grad_accum_steps=2)  # 4 rows and 2
    for trainer in (whole, parts):
        report = trainer.step()
        assert trainer.objective.config.weight == pytest.approx(weight)
        assert report.extras["provenance"] == pytest.approx(5.0, rel=1e-6)
        assert report.extras["total"] == pytest.approx(report.loss + 5.0, rel=1e-6)
    given = provenance_trainer("additive", micro_batch_size=6, objective={"weight": 0.25})
    assert given.step().extras["provenance"] == pytest.approx(0.25 * np.mean(values), rel=1e-6)


def test_the_weighted_loss_is_a_hand_weighted_sum_of_the_rows():
    trainer = provenance_trainer(micro_batch_size=6)
    squares = np.array([(math.log(1 - w + 1e-8) + entropy) ** 2 for w, entropy in PROVENANCE])
    weights = squares / squares.mean()
    assert trainer.objective.row_weights == pytest.approx(weights)
    assert weights.mean() == pytest.approx(1)
    sums, counts = zip(*row_losses(trainer.model, trainer.data.train))
    report = trainer.step()
    expected = (weights * sums).sum() / sum(counts)
    assert report.extras["weighted_cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert report.extras["total"] == report.extras["weighted_cross_entropy"]
    assert report.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert report.extras["weighted_cross_entropy_grad_norm"] == report.grad_norm


def test_the_weighted_gradient_is_the_slope():
    trainer = provenance_trainer(micro_batch_size=6)
    list(trainer)  # lora_b leaves zero
    model, (term,) = trainer.model, terms_of(trainer)
    batch = collate(trainer.data.train, range(6))
    _, gradients, _ = differentiate(model, [term], [batch], seed=0)
    gradients = {n: np.array(g) / batch.num_tokens for n, g in tree_flatten(gradients)}
    weights, before = trainer.objective.row_weights, trained(trainer)

    def total():
        losses = row_losses(model, trainer.data.train)
        return sum(k * value for k, (value, _) in zip(weights, losses)) / batch.num_tokens

    random = np.random.default_rng(0)
    length = norm_of(gradients)
    steepest = {name: gradient / length for name, gradient in gradients.items()}
    for _ in range(2):  # along the gradient, then half across it
        step, values = 1e-2, []
        for sign in (1, -1):
            moved = [(n, mx.array(a + sign * step * steepest[n])) for n, a in before.items()]
            model.update(tree_unflatten(moved))
            values.append(total())
        slope = sum((steepest[n] * g).sum() for n, g in gradients.items())
        assert slope > 0.3 * length
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)
        noise = {n: random.standard_normal(a.shape) for n, a in before.items()}
        across = math.sqrt(sum(np.square(a).sum() for a in noise.values()))
        steepest = {n: ((d + noise[n] / across) / 2).astype("f") for n, d in steepest.items()}


def test_weights_change_the_update_and_equal_ones_do_not():
    plain, weighted = provenance_trainer(None, epochs=2), provenance_trainer(epochs=2)
    equal = provenance_trainer(data=toy_documents([(0.4, 2.5)] * 6), epochs=2)
    for trainer in (plain, weighted, equal):
        list(trainer)
    after = [trained(trainer) for trainer in (plain, weighted, equal)]
    assert max(np.abs(after[1][n] - after[0][n]).max() for n in after[0]) > 5e-3
    assert max(np.abs(after[2][n] - after[0][n]).max() for n in after[0]) < 2e-3


def test_alpha_cancels_in_the_weighted_form():
    runs = [provenance_trainer(epochs=2, objective={"alpha": alpha}) for alpha in (2.3, 3.0)]
    assert [r.extras for r in list(runs[0])] == [r.extras for r in list(runs[1])]
    assert state_of(runs[0]) == state_of(runs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_make_the_gradients_of_one_batch(kind):
    trainer = provenance_trainer(kind)
    list(trainer)
    found = []
    for cut in ([range(6)], [range(4), range(4, 6)], [[row] for row in range(6)]):
        batches = [collate(trainer.data.train, rows) for rows in cut]
        found.append(differentiate(trainer.model, terms_of(trainer), batches, seed=0))
    (total, gradients, reported), *others = found
    gradients = dict(tree_flatten(gradients))
    largest = max(mx.abs(g).max().item() for g in gradients.values())
    for other_total, other_gradients, other_reported in others:
        assert other_total.item() == pytest.approx(total.item(), rel=1e-5)
        for name, value in reported.items():
            assert other_reported[name].item() == pytest.approx(value.item(), rel=1e-4), name
        for name, gradient in tree_flatten(other_gradients):
            assert mx.abs(gradient - gradients[name]).max().item() < 1e-4 * largest


def test_terms_are_summed_and_each_reports_its_own_gradient():
    model = toy_base().model
    add_lora(model, LoRAConfig(rank=4))
    batches = [collate(toy_examples(LENGTHS), rows) for rows in ([0, 1, 2, 3], [4, 5])]
    targets, factor = sum(batch.num_tokens for batch in batches), 7.5
    terms = (
        Term(plain_loss, "cross_entropy"),
        Term(confidence, "confidence", factor, lambda batch: 1),
        Term(lambda model, batch: mx.array(3.0), "constant", 2.0, num_rows),
    )
    total, gradients, reported = differentiate(model, terms, batches, seed=0)

    def alone(function):
        values, slopes = zip(*(nn.value_and_grad(model, function)(model, b) for b in batches))
        flat = [dict(tree_flatten(slope)) for slope in slopes]
        return sum(values).item(), {n: np.array(flat[0][n] + flat[1][n]) for n in flat[0]}

    (loss, slopes), (value, others) = alone(plain_loss), alone(confidence)
    value, others = factor * value / 2, {n: factor * g / 2 for n, g in others.items()}
    slopes = {n: g / targets for n, g in slopes.items()}
    assert reported["cross_entropy"].item() == pytest.approx(loss / targets, rel=1e-5)
    assert reported["confidence"].item() == pytest.approx(value, rel=1e-5)
    assert reported["constant"].item() == pytest.approx(2.0 * 6.0 / 6)
    parts = sum(reported[term.name].item() for term in terms)
    assert reported["total"].item() == total.item() == pytest.approx(parts, rel=1e-6)
    assert reported["cross_entropy_grad_norm"].item() == pytest.approx(norm_of(slopes), rel=1e-4)
    assert reported["confidence_grad_norm"].item() == pytest.approx(norm_of(others), rel=1e-4)
    assert reported["constant_grad_norm"].item() == 0
    largest = max(np.abs(g).max() for g in slopes.values())
    for name, gradient in tree_flatten(gradients):
        expected = slopes[name] + others[name]
        assert np.abs(np.array(gradient) / targets - expected).max() < 1e-4 * largest


def test_a_callers_own_loss_is_reported_whatever_it_measures_beside_it():
    def doubled(model, batch):
        loss = plain_loss(model, batch)
        return 2 * loss, {"cross_entropy": mx.stop_gradient(loss)}

    report = toy_trainer(loss_fn=doubled).step()
    assert report.loss == pytest.approx(2 * report.extras["cross_entropy"])


def test_a_term_that_is_not_finite_stops_the_step():
    trainer = provenance_trainer("additive")
    before = state_of(trainer)
    trainer.objective.additive_sum = lambda model, batch: mx.array(math.nan)
    with pytest.raises(ValueError, match="step 1 gave loss nan"):
        trainer.step()
    assert state_of(trainer) == before
    skipping = provenance_trainer("weighted", on_bad_step="skip")
    skipping.objective.weighted_sum = lambda model, batch: plain_loss(model, batch) * math.inf
    assert skipping.step().skipped


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_trainer_is_told_which_of_its_terms_are_dead(kind):
    trainer = provenance_trainer(kind)
    list(trainer)
    batch = collate(trainer.data.train, range(4))
    report = check_training(
        trainer.model, trainer.loss_fn, batch, mode="lora", terms=loss_terms(trainer)
    )
    found = {finding.detail.split(" ")[0]: finding for finding in report.findings}
    if kind == "weighted":
        assert report.ok
        assert found["weighted_cross_entropy"].check == "loss terms"
        return
    assert [f.check for f in report.failures] == ["loss terms"]
    assert "gradient norm 0: it reaches no parameter" in found["provenance"].detail
    assert found["cross_entropy"].status == "ok"


@pytest.mark.parametrize("kind", KINDS)
def test_validation_and_the_best_checkpoint_go_by_plain_cross_entropy(kind, tmp_path):
    trainer = provenance_trainer(
        kind, valid=(9, 14, 6), valid_every=1, steps=6, learning_rate=5e-2, run_dir=tmp_path
    )
    plain = []
    for report in trainer:
        plain.append(mean_loss(trainer.model, trainer.data.valid, 4))
        assert report.valid_loss == pytest.approx(plain[-1], rel=1e-6)  # fused, and not
        assert not [name for name in report.extras if name.startswith("valid")]
    assert trainer.progress.best_step == 1 + np.argmin(plain)
    trainer.load_best()
    assert trainer.validate() == pytest.approx(min(plain), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_uninterrupted_one(kind, tmp_path):
    settings = {"epochs": 3, "lora": {"dropout": 0.2}, "valid": (8,), "valid_every": 2}
    whole = provenance_trainer(kind, **settings)
    list(whole)
    stopped = provenance_trainer(kind, run_dir=tmp_path, **settings)
    for report in stopped:
        if report.step == 2:
            stopped.stop()
    resumed = provenance_trainer(kind, run_dir=tmp_path, **settings)
    assert resumed.steps_done == 2
    assert resumed.objective.config == whole.objective.config
    list(resumed)
    assert list(map(computed, resumed.reports)) == list(map(computed, whole.reports))
    assert state_of(resumed) == state_of(whole)
    rows = read_metrics(tmp_path).to_dict("records")
    assert [row["extras"] for row in rows] == [report.extras for report in whole.reports]
    written = json.loads((tmp_path / "config.json").read_text())["objective"]
    assert written == dataclasses.asdict(whole.objective.config)
    assert (written["weight"] == "auto") is (kind == "weighted")


def test_another_objective_or_other_provenance_is_another_run(tmp_path):
    next(iter(provenance_trainer("additive", run_dir=tmp_path, epochs=2)))
    for kind, changes, says in (
        ("additive", {"alpha": 2.5}, r"objective\.alpha is 2\.5, was 2\.7"),
        ("additive", {"weight": 0.5}, r"objective\.weight is 0\.5, was 0\.13"),
        ("weighted", {}, r"objective\.kind is 'weighted', was 'additive'"),
        (None, {}, r"objective is None, was 'ProvenanceConfig'"),
    ):
        with pytest.raises(RunError, match=says):
            provenance_trainer(kind, run_dir=tmp_path, epochs=2, objective=changes)
    data = toy_documents([(w, entropy + (w == 0)) for w, entropy in PROVENANCE])
    with pytest.raises(RunError, match="the training data is another"):
        provenance_trainer("additive", run_dir=tmp_path, epochs=2, data=data)


@pytest.mark.parametrize("form", ["shared_prompt", "prefix_cache"])
def test_faster_forms_change_no_weighted_loss(form):
    data = toy_documents()
    for example in data.train:
        example.tokens[:4] = [5, 6, 7, 8]  # a prompt that all share
    runs = {}
    for used in (True, False):
        faster = {"shared_prompt": False, "prefix_cache": False, form: used}
        runs[used] = provenance_trainer(data=data, epochs=3, lora={"num_layers": 1}, **faster)
        list(runs[used])
    assert runs[True].prefix.used is (form == "prefix_cache")
    assert runs[True].prompt_sharing.used is (form == "shared_prompt")
    for ours, theirs in zip(runs[True].reports, runs[False].reports, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.extras["total"] == pytest.approx(theirs.extras["total"], rel=1e-4)
    if form == "prefix_cache":
        assert runs[True].prefix.cache.hits > 0


def test_the_fused_loss_is_kept_where_it_is_exact():
    base, data = toy_base(), toy_documents()
    add_lora(base.model)
    with pytest.warns(FallbackWarning, match="no fused loss in the update") as caught:
        Trainer(base, data, TrainConfig(fused_loss=True), objective=ProvenanceConfig("weighted"))
    assert caught[0].filename == __file__
    plain, additive = (
        provenance_trainer(kind, fused_loss=True, epochs=2) for kind in (None, "additive")
    )
    assert [r.loss for r in plain] == [r.loss for r in additive]


def test_a_stream_cannot_be_weighed(tmp_path):
    base = toy_base()
    add_lora(base.model)
    for kind in ("additive", "weighted"):
        with pytest.raises(ConfigError, match=r"a stream cannot be weighed: .*load_dataset"):
            Trainer(
                base,
                toy_stream(write_files(tmp_path)),
                TrainConfig(steps=2),
                objective=ProvenanceConfig(kind),
            )


def test_the_largest_weight_still_makes_finite_numbers():
    trainer = provenance_trainer("additive", objective={"weight": 1e30}, epochs=1)
    assert all(math.isfinite(report.extras["provenance"]) for report in trainer)


def test_data_and_objective_must_fit():
    base, rows = toy_base(), toy_documents()
    add_lora(base.model)
    with pytest.raises(ConfigError, match=r"provenance objective needs rows, .* holds pairs"):
        Trainer(base, toy_preferences(), objective=ProvenanceConfig())
    with pytest.raises(ConfigError, match="DPO needs preference pairs, toy holds rows"):
        Trainer(base, rows, objective=DPOConfig())
    with pytest.raises(ConfigError, match="exclude each other"):
        Trainer(base, rows, loss_fn=plain_loss, objective=ProvenanceConfig())
    with pytest.raises(DataError, match=r"toy row 0: has no 'authority_weight'.*add_provenance"):
        Trainer(base, toy_dataset([9, 9]), objective=ProvenanceConfig())


def test_what_trains_nothing_is_said_in_words():
    base, data = toy_base(), toy_documents()
    add_lora(base.model)
    with pytest.warns(ObjectiveWarning, match="trains nothing.*changes no update") as caught:
        trainer = Trainer(base, data, objective=ProvenanceConfig())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "has no gradient and changes no update" in str(trainer.objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = trainer.step()
        weighted = Trainer(base, data, objective=ProvenanceConfig("weighted"))
    assert "provenance_grad_norm 0 " in str(report)
    assert "weighted, an extension" in str(weighted.objective)


@pytest.mark.parametrize("kind", KINDS)
def test_the_profile_takes_the_loss_that_trains(kind):
    profile = profile_step(provenance_trainer(kind, epochs=4, micro_batch_size=6), steps=1)
    report = provenance_trainer(kind, micro_batch_size=6).step()
    trained_by = "weighted_cross_entropy" if kind == "weighted" else "cross_entropy"
    assert profile.losses[0] == pytest.approx(report.extras[trained_by], rel=1e-6)


def test_the_chart_calls_the_loss_what_it_is():
    reports = list(provenance_trainer("additive", epochs=2))

    def picture(extras):
        chart, history = RunChart(), History()
        history.extend([dataclasses.replace(report, extras=extras) for report in reports])
        chart.update(history)
        return chart.png()

    assert picture(reports[0].extras) == picture(None) != picture({"margin": 1.0})
