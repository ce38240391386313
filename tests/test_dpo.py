"""The DPO loss: its values by hand, its gradient by finite differences, its reference."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from tests.architectures import ARCHITECTURES
from tests.toy import toy_base, toy_model
from tests.toy_preferences import RAGGED, toy_pairs
from workbench.data.batches import Batch, collate
from workbench.data.examples import all_sides
from workbench.errors import ConfigError, TrainingError
from workbench.probes.parameters import fingerprint
from workbench.tuning import references as module
from workbench.tuning.dpo import DPOConfig, DPOLoss, preference_losses
from workbench.tuning.lora import LoRAConfig, adapter_disabled, add_lora
from workbench.tuning.losses import row_log_probs
from workbench.tuning.references import References
from workbench.tuning.update import accumulate

PAIRS = toy_pairs(RAGGED)
BATCH = collate(PAIRS, range(len(PAIRS)))
FORMS = {
    "sigmoid": DPOConfig(beta=0.2),
    "smoothed": DPOConfig(beta=0.2, label_smoothing=0.25),
    "hinge": DPOConfig(beta=0.01, loss_type="hinge"),
    "ipo": DPOConfig(beta=0.3, loss_type="ipo"),
}


def adapted_model(seed=0, moved=0.05, **lora):
    """A toy model whose adapter says something."""
    model = toy_model(seed)
    add_lora(model, LoRAConfig(**{"rank": 4, **lora}))
    key = mx.random.key(seed + 1)
    update = tree_map(
        lambda array: array + moved * mx.random.normal(array.shape, key=key),
        model.trainable_parameters(),
    )
    model.update(update)
    mx.eval(model.parameters())
    return model.eval()


def log_prob_by_hand(model, example):
    """Σ log softmax(logits)[target] in float64, a row by itself."""
    logits = np.array(model(mx.array(example.tokens[None, :-1])), dtype=np.float64)[0]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    targets = example.tokens[1:]
    return log_probs[np.arange(len(targets)), targets][example.loss_mask[1:]].sum()


def losses_by_hand(model, config):
    """Equation 7 and its relatives, pair by pair; and each pair's margin."""
    losses, margins = [], []
    for pair in PAIRS:
        policy = [log_prob_by_hand(model, side) for side in pair.sides]
        with adapter_disabled(model):
            reference = [log_prob_by_hand(model, side) for side in pair.sides]
        h = (policy[0] - reference[0]) - (policy[1] - reference[1])
        margins.append(config.beta * h)
        sigma = 1 / (1 + math.exp(-config.beta * h))
        losses.append(
            {
                "sigmoid": -(1 - config.label_smoothing) * math.log(sigma)
                - config.label_smoothing * math.log(1 - sigma),
                "hinge": max(0.0, 1 - config.beta * h),
                "ipo": (h - 1 / (2 * config.beta)) ** 2,
            }[config.loss_type]
        )
    return losses, margins


def dpo_loss(model, config):
    return DPOLoss(config, References(model, all_sides(PAIRS)))


@pytest.mark.parametrize(
    ("margin", "config", "expected"),
    [
        (0.0, DPOConfig(), math.log(2)),
        (2.0, DPOConfig(), math.log(1 + math.exp(-2))),
        (-2.0, DPOConfig(), math.log(1 + math.exp(2))),
        (-300.0, DPOConfig(), 300.0),  # no overflow
        (300.0, DPOConfig(), 0.0),
        (0.0, DPOConfig(label_smoothing=0.3), math.log(2)),
        (2.0, DPOConfig(label_smoothing=0.25), math.log(1 + math.exp(-2)) + 0.25 * 2),
        (0.25, DPOConfig(loss_type="hinge"), 0.75),
        (1.5, DPOConfig(loss_type="hinge"), 0.0),
        (0.2, DPOConfig(beta=0.1, loss_type="ipo"), 9.0),  # (2 - 5)²
        (0.5, DPOConfig(beta=0.1, loss_type="ipo"), 0.0),
    ],
)
def test_losses_by_hand(margin, config, expected):
    (loss,) = preference_losses(mx.array([margin]), config).tolist()
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "name", [None, "gemma2", "gpt2", "olmo2", "mamba2", "mixtral", "falcon_h1"]
)
def test_log_probabilities_of_rows_are_those_by_hand(name):
    if name is None:
        model, pairs = adapted_model(), PAIRS
    else:
        model = ARCHITECTURES[name].build()
        vocab = model(mx.array([[1]])).shape[-1]
        pairs = [
            type(pair)(*(_within(side, vocab) for side in pair.sides), pair.where) for pair in PAIRS
        ]
    batch = collate(pairs, range(len(pairs)))
    expected = [log_prob_by_hand(model, pair.chosen) for pair in pairs]
    expected += [log_prob_by_hand(model, pair.rejected) for pair in pairs]
    assert row_log_probs(model, batch).tolist() == pytest.approx(expected, rel=1e-4)


def _within(example, vocab):
    return type(example)(example.tokens % vocab, example.loss_mask, example.where)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_batch_is_that_by_hand(form):
    model, config = adapted_model(), FORMS[form]
    loss, measures = dpo_loss(model, config)(model, BATCH)
    losses, margins = losses_by_hand(model, config)
    assert loss.item() == pytest.approx(sum(losses), rel=1e-4)
    assert measures["margin"].item() == pytest.approx(sum(margins), rel=1e-3, abs=1e-4)
    assert measures["accuracy"].item() == sum(margin > 0 for margin in margins)
    shift = (measures["chosen_shift"] - measures["rejected_shift"]).item()
    assert config.beta * shift == pytest.approx(sum(margins), rel=1e-3, abs=1e-4)
    assert 0 < sum(margin > 0 for margin in margins) < len(margins)  # both kinds were seen
    assert BATCH.weight == len(PAIRS)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_finite_differences(form):
    model, config = adapted_model(), FORMS[form]
    loss_fn = dpo_loss(model, config)
    _, gradients = accumulate(model, loss_fn, [BATCH], seed=0)
    start = model.trainable_parameters()
    flat = dict(tree_flatten(gradients))
    norm = math.sqrt(sum(mx.square(g).sum().item() for g in flat.values()))
    step = 2e-3 / norm

    def loss_at(distance):
        model.update(tree_map(lambda w, g: w + distance * g, start, gradients))
        return loss_fn(model.eval(), BATCH)[0].item()

    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert slope == pytest.approx(norm**2, rel=2e-2)


def test_a_fresh_adapter_has_a_loss_of_ln_2_and_a_gradient_that_beta_scales():
    model = toy_model()
    add_lora(model, LoRAConfig(rank=4))
    found = {}
    for beta in (0.1, 0.3):
        loss, gradients = accumulate(model, dpo_loss(model, DPOConfig(beta=beta)), [BATCH], 0)
        assert loss.item() / BATCH.weight == pytest.approx(math.log(2), abs=1e-6)
        found[beta] = dict(tree_flatten(gradients))
    scale = max(mx.abs(g).max().item() for g in found[0.1].values())
    assert scale > 0.01
    for name, gradient in found[0.1].items():
        assert mx.abs(found[0.3][name] - 3 * gradient).max().item() < 1e-4 * scale


def test_rows_alone_have_exactly_their_reference():
    # The same rows in the same shape: the same sums, so not even rounding is left.
    model = toy_model()
    add_lora(model, LoRAConfig(rank=4))
    for pair in toy_pairs([(5, 5)], prompt=1):
        loss, _ = DPOLoss(DPOConfig(), References(model, pair.sides))(model, collate([pair], [0]))
        assert loss.item() == mx.array(math.log(2)).item()


def test_the_reference_is_the_base_whatever_the_adapter_says():
    plain = References(adapted_model(moved=0), all_sides(PAIRS))
    for dora in (False, True):
        model = adapted_model(moved=0.1, dropout=0.5, use_dora=dora)
        before = fingerprint(model)
        references = References(model.train(), all_sides(PAIRS))
        assert references(BATCH).tolist() == plain(BATCH).tolist()
        assert model.training
        assert fingerprint(model) == before
        policy = row_log_probs(model.eval(), BATCH)
        assert mx.abs(policy - references(BATCH)).min().item() > 1e-3
    assert len(plain) == 2 * len(PAIRS)


def test_nothing_drops_out_of_the_reference():
    model = adapted_model()
    model.model.norm = nn.Dropout(0.5)
    assert References(model.train(), all_sides(PAIRS))(BATCH).tolist() == (
        References(model.eval(), all_sides(PAIRS))(BATCH).tolist()
    )


def test_each_row_is_computed_once(monkeypatch):
    rows = []
    own = module.row_log_probs
    monkeypatch.setattr(
        module, "row_log_probs", lambda model, batch: rows.extend(batch.rows) or own(model, batch)
    )
    model = toy_model()
    add_lora(model)
    references = References(model, all_sides([*PAIRS, *PAIRS[:2]]))
    loss_fn = DPOLoss(DPOConfig(), references)
    for _ in range(3):
        accumulate(model, loss_fn, [BATCH], seed=0)
    assert len(rows) == len(references) == 2 * len(PAIRS)


def test_references_do_not_depend_on_the_order_of_the_rows():
    model = adapted_model()
    forwards, backwards = (
        References(model, all_sides(PAIRS)),
        References(model, all_sides(PAIRS)[::-1]),
    )
    assert forwards(BATCH).tolist() == backwards(BATCH).tolist()


def test_rows_that_nobody_announced_are_computed_when_they_come():
    model = adapted_model()
    references = References(model, PAIRS[0].sides)
    loss_fn = DPOLoss(DPOConfig(), references)
    loss, _ = accumulate(model, loss_fn, [BATCH], seed=0)
    expected, _ = accumulate(model, dpo_loss(model, DPOConfig()), [BATCH], seed=0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(references) == 2 * len(PAIRS)


def test_other_weights_in_the_base_have_other_references():
    model, other = adapted_model(), adapted_model(seed=5)
    references = References(model, all_sides(PAIRS))
    before, key = references(BATCH).tolist(), references.key
    frozen = dict(tree_flatten(other.parameters()))
    names = {name for name, _ in references._weights()}
    model.load_weights([(n, a) for n, a in frozen.items() if n in names], strict=False)
    now = references(BATCH).tolist()
    assert references.key != key
    assert now != before
    assert now == References(other, all_sides(PAIRS))(BATCH).tolist()


def test_the_same_weights_in_new_arrays_keep_what_is_held():
    model = adapted_model()
    references = References(model, all_sides(PAIRS))
    held = references._held
    copies = [(name, array + 0) for name, array in references._weights()]
    model.load_weights(copies, strict=False)
    references(BATCH)
    assert references._held is held


def test_more_than_an_adapter_that_trains_is_refused():
    model = toy_model()
    with pytest.raises(TrainingError, match=r"trains and is no adapter's.*wb\.add_lora"):
        References(model)
    add_lora(model)
    model.model.layers[0].self_attn.q_proj.linear.unfreeze()
    with pytest.raises(TrainingError, match=r"q_proj\.linear\.weight trains"):
        References(model)


def test_padding_is_no_part_of_a_row():
    model = adapted_model()
    references = References(model, all_sides(PAIRS))
    wide = Batch(
        np.pad(BATCH.tokens, ((0, 0), (0, 7)), constant_values=9),
        np.pad(BATCH.loss_mask, ((0, 0), (0, 7))),
        BATCH.rows,
        BATCH.sides,
    )
    assert references(wide).tolist() == references(BATCH).tolist()
    assert len(references) == 2 * len(PAIRS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": 0}, "beta must be above 0"),
        ({"beta": -1.0}, "beta must be a number"),
        ({"beta": math.nan}, "beta must be a number"),
        ({"beta": "0.1"}, "beta must be a number"),
        ({"loss_type": "kto"}, "unknown loss_type 'kto'.*sigmoid"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"label_smoothing": -0.1}, "label_smoothing must be a number"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "no meaning for the loss_type ipo"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        DPOConfig(**settings)


def test_a_base_of_its_own_kind_of_head_is_trained_in_the_plain_form():
    class Wrapped(nn.Module):
        """A network that does not part into backbone and head."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, tokens):
            return self.inner(tokens)

    inner = toy_base().model
    expected = row_log_probs(inner, BATCH).tolist()
    assert row_log_probs(Wrapped(inner), BATCH).tolist() == pytest.approx(expected, rel=1e-5)
