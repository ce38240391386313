"""Every tiny architecture is a correct causal language model, and no two places say the same."""

import importlib
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from tests.architecture_settings import COMMON, VOCAB_SIZE
from tests.architectures import ARCHITECTURES

ROWS, LENGTH = 2, 9
NAMES = list(ARCHITECTURES)


@pytest.fixture(scope="module", autouse=True)
def _without_compilation():
    # mlx-lm compiles small functions, which takes seconds the first time on a CPU.
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def tokens():
    """(B, T) ids, no two alike."""
    chosen = np.random.default_rng(0).choice(VOCAB_SIZE, ROWS * LENGTH, replace=False)
    return mx.array(chosen.reshape(ROWS, LENGTH))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_finite_and_no_two_are_alike(name, tokens):
    logits = np.array(ARCHITECTURES[name].build()(tokens))
    assert logits.shape == (ROWS, LENGTH, VOCAB_SIZE)
    assert np.isfinite(logits).all()
    rows = logits.reshape(-1, VOCAB_SIZE)
    apart = np.abs(rows[:, None] - rows[None]).max(axis=-1)[~np.eye(len(rows), dtype=bool)]
    assert apart.min() > 0.05 * np.abs(rows).max()


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_with_a_cache_gives_the_same(name, tokens):
    model = ARCHITECTURES[name].build()
    model.eval()
    plain, cache = model(tokens), make_prompt_cache(model)
    steps = [model(tokens[:, at : at + 1], cache=cache) for at in range(LENGTH)]
    apart = mx.abs(mx.concatenate(steps, axis=1) - plain).max() / mx.abs(plain).max()
    assert apart.item() < 1e-4


def test_every_setting_is_read_by_an_architecture_that_has_it():
    given, read = set(COMMON), set()
    for architecture in ARCHITECTURES.values():
        library = importlib.import_module(f"mlx_lm.models.{architecture.module}")
        known = {setting.name for setting in fields(library.ModelArgs)}
        given |= set(architecture.settings)
        read |= known & {*COMMON, *architecture.settings}
    assert given - read == set()


def test_the_same_seed_builds_the_same_weights():
    for name in ("llama", "qwen3_next"):  # mlx-lm draws the second one's decays itself
        one, other, third = (ARCHITECTURES[name].build(seed) for seed in (1, 1, 2))
        tokens = mx.array([[1, 2, 3]])
        assert mx.array_equal(one(tokens), other(tokens))
        assert not mx.array_equal(one(tokens), third(tokens))
