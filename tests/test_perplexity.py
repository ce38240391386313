"""Perplexity is the exponential of the loss that training reports."""

import math

import numpy as np
import pytest

from tests.toy import toy_dataset, toy_examples
from workbench.data.datasets import load_dataset
from workbench.data.examples import Example
from workbench.errors import ConfigError, DataError
from workbench.evaluation.intervals import sign_test, wilson
from workbench.evaluation.likelihood import score_rows
from workbench.evaluation.perplexity import perplexity, windows
from workbench.tuning.losses import mean_loss

LENGTHS = [9, 30, 12, 5, 17]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_it_is_the_loss_of_training(base, batch_size):
    data = toy_dataset([4], LENGTHS)
    found = perplexity(base, data, batch_size=batch_size)
    loss = mean_loss(base.model, data.valid, 2)
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.num_tokens == sum(row.num_targets for row in data.valid)
    assert found.num_rows == len(LENGTHS)
    assert perplexity(base, data.valid) == perplexity(base, data)


def test_it_is_the_loss_of_the_real_model(smollm2):
    data = load_dataset("capitals", smollm2.tokenizer, limit=6)
    found = perplexity(smollm2, data)
    assert found.loss == pytest.approx(mean_loss(smollm2.model, data.valid, 4), abs=1e-4)
    assert found.interval[0] < found.value < found.interval[1]


def test_its_standard_error_is_that_of_a_ratio_of_sums(base):
    rows = toy_examples(list(range(4, 44)))
    found = perplexity(base, rows)
    sums = np.array([-score.log_probs.sum() for score in score_rows(base, rows)])
    counts = np.array([row.num_targets for row in rows])
    random = np.random.default_rng(0)
    picks = random.integers(0, len(rows), (20_000, len(rows)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    # The bootstrap of R rows is too narrow by sqrt((R - 1) / R).
    expected = means.std() * math.sqrt(len(rows) / (len(rows) - 1))
    assert found.standard_error == pytest.approx(expected, rel=0.1)
    assert perplexity(base, rows[:1]).standard_error is None
    assert perplexity(base, rows[:1]).interval is None


@pytest.mark.parametrize("longest", [4, 7, 40])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_windows_score_each_target_once_and_fit(longest, stride):
    row = toy_examples([31], prompt=6)[0]
    places = np.arange(len(row))
    numbered = Example(places.astype(np.int32), row.loss_mask, "row")
    pieces = windows(numbered, longest, stride)
    scored = np.concatenate([piece.tokens[piece.loss_mask] for piece in pieces])
    assert scored.tolist() == places[row.loss_mask].tolist()
    assert all(len(piece) <= longest + 1 and not piece.loss_mask[0] for piece in pieces)
    for piece in pieces[1:]:
        assert piece.loss_mask.argmax() >= longest + 1 - stride  # tokens read before


def test_a_long_row_is_read_in_windows(base):
    row = toy_examples([900])[0]
    with pytest.raises(DataError, match="has 900 tokens, the model has 512 positions"):
        score_rows(base, [row])
    total, scored = 0.0, 2
    for end in (513, 769, 900):  # half of the model's positions further each time
        window = Example(row.tokens[end - 513 : end], np.arange(513) >= scored - end + 513, "")
        total -= score_rows(base, [window])[0].log_probs.sum()
        scored = end
    found = perplexity(base, [row])
    assert found.num_tokens == 898
    assert found.loss == pytest.approx(total / 898, abs=1e-5)


def test_windows_that_hold_all_change_nothing(base):
    rows = toy_examples(LENGTHS)
    assert perplexity(base, rows, max_positions=40) == perplexity(base, rows)
    assert perplexity(base, rows, max_positions=6).loss != perplexity(base, rows).loss


BAD = {
    "no such split": ({"split": "vaild"}, ConfigError, "split 'vaild' is unknown"),
    "an empty split": ({"split": "test"}, DataError, r"no rows in its split 'test'.*train, valid"),
    "no positions": ({"max_positions": 1}, ConfigError, "max_positions must be a whole number"),
    "no stride": ({"stride": 0}, ConfigError, "stride must be a whole number"),
    "gaps": ({"stride": 9, "max_positions": 8}, ConfigError, "stride 9 exceeds the window of 8"),
    "no batch": ({"batch_size": 0}, ConfigError, "batch_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_setting_is_named(base, name):
    settings, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        perplexity(base, toy_dataset([4], [5]), **settings)


@pytest.mark.parametrize("data", [[], ["text"], "text"])
def test_rows_that_are_none_are_refused(base, data):
    with pytest.raises(DataError, match="needs tokenised rows"):
        perplexity(base, data)


def test_wilson_gives_the_textbook_values():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(1, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    assert wilson(0.9, 1000)[1] - wilson(0.9, 1000)[0] < 0.04


def test_the_sign_test_gives_the_textbook_values():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(9, 1) == pytest.approx(22 / 1024)
