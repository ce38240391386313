"""Order, padding and masks of batches."""

import numpy as np
import pytest

from tests.toy import toy_examples
from workbench.data.batches import BatchPlan, collate
from workbench.data.datasets import load_dataset
from workbench.errors import ConfigError, DataError


def epoch_rows(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [batch.tolist() for step in steps for batch in plan.micro_batches(step)]


def padding_share(lengths, batch_size):
    plan = BatchPlan(tuple(lengths), batch_size)
    batches = epoch_rows(plan, 0)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths) / padded


@pytest.mark.parametrize("count", [1, 3, 8, 29])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (4, 1), (4, 3), (64, 2)])
def test_every_row_is_used_once_an_epoch(count, batch_size, accumulate):
    lengths = np.random.default_rng(0).integers(5, 50, count).tolist()
    plan = BatchPlan(tuple(lengths), batch_size, accumulate)
    for epoch in range(3):
        rows = [row for batch in epoch_rows(plan, epoch) for row in batch]
        assert sorted(rows) == list(range(count))


def test_steps_hold_as_many_micro_batches_as_asked():
    plan = BatchPlan((5,) * 29, micro_batch_size=4, grad_accum_steps=3)
    sizes = [len(plan.micro_batches(step)) for step in range(plan.steps_per_epoch)]
    assert sizes == [3, 3, 2]  # 29 rows are 8 micro-batches
    assert sum(len(batch) for step in range(3) for batch in plan.micro_batches(step)) == 29


def test_order_is_a_pure_function_of_seed_and_epoch():
    lengths = tuple(range(5, 45))
    one, same = BatchPlan(lengths, 4, seed=7), BatchPlan(lengths, 4, seed=7)
    late = epoch_rows(same, 5)  # asked for first, without the epochs before it
    assert [epoch_rows(one, epoch) for epoch in range(6)][5] == late
    assert epoch_rows(one, 0) == epoch_rows(same, 0)
    assert epoch_rows(one, 0) != epoch_rows(one, 1)
    assert epoch_rows(one, 0) != epoch_rows(BatchPlan(lengths, 4, seed=8), 0)


def test_rows_of_one_length_change_company():
    plan = BatchPlan((10,) * 16, 4)
    together = [{frozenset(batch) for batch in epoch_rows(plan, epoch)} for epoch in range(2)]
    assert together[0] != together[1]


@pytest.mark.parametrize("batch_size", [4, 8])
def test_padding_on_short_chats_is_at_most_8_percent(batch_size, tokenizer):
    random = np.random.default_rng(1).integers(30, 61, 64).tolist()
    capitals = [len(example) for example in load_dataset("capitals", tokenizer, limit=144).train]
    assert padding_share(random, batch_size) <= 0.08
    assert padding_share(capitals, batch_size) <= 0.08


def test_rows_in_arrival_order_would_break_the_bound():
    lengths = np.random.default_rng(1).integers(30, 61, 64).tolist()
    longest = [max(lengths[start : start + 4]) for start in range(0, 64, 4)]
    assert 1 - sum(lengths) / (4 * sum(longest)) > 0.08


def test_tokens_and_masks_survive_padding():
    examples = toy_examples([7, 4, 9])
    batch = collate(examples, [2, 1])
    assert batch.tokens.shape == batch.loss_mask.shape == (2, 9)
    assert batch.rows == (2, 1)
    for place, row in enumerate(batch.rows):
        length = len(examples[row])
        assert np.array_equal(batch.tokens[place, :length], examples[row].tokens)
        assert np.array_equal(batch.loss_mask[place, :length], examples[row].loss_mask)
        assert not batch.loss_mask[place, length:].any()
    assert batch.num_tokens == examples[2].num_targets + examples[1].num_targets


def test_a_first_token_is_never_counted_as_a_target():
    batch = collate(toy_examples([5], prompt=0), [0])
    assert batch.loss_mask[0, 0]
    assert batch.num_tokens == 4


@pytest.mark.parametrize("name", ["micro_batch_size", "grad_accum_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_size_that_is_no_whole_number_from_1_raises(name, value):
    with pytest.raises(ConfigError, match=name):
        BatchPlan((5, 6), **{"micro_batch_size": 1, name: value})


def test_no_rows_raise():
    with pytest.raises(DataError, match="no training rows"):
        BatchPlan((), 4)
