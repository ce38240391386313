"""Temperature, top-p and seed."""

import mlx.core as mx
import numpy as np
import pytest

import workbench as wb
from workbench.errors import ConfigError
from workbench.evaluation.generation import SamplingConfig, choose, generate

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -3.0], dtype=np.float32)


def frequencies(sampling, draws=40_000):
    logits = mx.broadcast_to(mx.array(LOGITS), (draws, 5))
    drawn = np.array(choose(logits, sampling, mx.random.key(0)))
    return np.bincount(drawn, minlength=5) / draws


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    expected = softmax(LOGITS / temperature)
    found = frequencies(SamplingConfig(temperature=temperature))
    assert np.abs(found - expected).max() < 0.012  # 5 standard deviations


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.7, 2), (0.9, 3), (0.97, 4), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    found = frequencies(SamplingConfig(temperature=1.0, top_p=top_p))
    expected = softmax(LOGITS) * (np.arange(5) < kept)
    assert np.abs(found - expected / expected.sum()).max() < 0.012
    assert (found[kept:] == 0).all()
    assert softmax(LOGITS)[:kept].sum() >= top_p - 1e-6
    assert softmax(LOGITS)[: kept - 1].sum() < top_p


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-5}, {"temperature": 5.0, "top_p": 1e-9}], ids=str
)
def test_sampling_becomes_greedy_in_the_limit(base, settings):
    assert generate(base, "Hi", **settings) == generate(base, "Hi")


def test_the_seed_decides_a_sample(base):
    texts = [generate(base, "Hi", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, 2.5, True, None)],
        *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), "1")],
        *[("top_p", value) for value in (0, 1.1, -1, float("nan"))],
        *[("seed", value) for value in (-1, 1.5)],
        *[("batch_size", value) for value in (0, 1.5)],
    ],
)
def test_a_bad_setting_raises_and_is_named(base, field, value):
    with pytest.raises(ConfigError, match=field):
        wb.generate(base, ["Hi"], **{field: value})
