"""Bits a byte of a network, and of a baseline that counts."""

import math
from collections import Counter, defaultdict

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from tests.toy import VOCAB_SIZE
from workbench.data.stories import story_corpus
from workbench.errors import ConfigError, DataError
from workbench.evaluation.bits_per_byte import bits_per_byte
from workbench.evaluation.likelihood import log_likelihood
from workbench.evaluation.ngrams import MAX_ORDER, count_ngrams, fit_ngrams

TEXT = "Der Bär sieht die Möwe.\n"


def test_a_network_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(base):
    base.model.update(tree_map(mx.zeros_like, base.model.parameters()))
    found = bits_per_byte(base, TEXT)
    assert found.num_bytes == found.num_tokens == len(TEXT.encode())
    assert found.value == pytest.approx(math.log2(VOCAB_SIZE), rel=1e-6)
    spelled = bits_per_byte(base, "<|im_end|>")
    assert (spelled.num_tokens, spelled.num_bytes) == (1, 10)
    assert spelled.value == pytest.approx(math.log2(VOCAB_SIZE) / 10, rel=1e-6)


def test_it_is_the_sum_of_all_log_probabilities(base):
    base.tokenizer.chat_template = None  # so that an empty prompt is the first token alone
    (scored,) = log_likelihood(base, [("", TEXT)])
    found = bits_per_byte(base, TEXT)
    assert found.bits == pytest.approx(-scored.total / math.log(2), rel=1e-5)
    assert str(found) == f"{found.value:.4f} (26 bytes, 26 tokens)"


def test_a_long_text_is_read_in_windows_and_none_of_it_is_left_out(base):
    text = TEXT * 30
    found = bits_per_byte(base, text, max_positions=64, stride=16)
    assert found.num_tokens == len(text.encode())
    assert found.value == pytest.approx(bits_per_byte(base, text[: 4 * len(TEXT)]).value, rel=0.2)


@pytest.mark.parametrize("text", ["", b"bytes", "\ud800"])
def test_what_is_no_text_is_refused(base, text):
    for measure in (lambda: bits_per_byte(base, text), lambda: fit_ngrams(text)):
        with pytest.raises(DataError):
            measure()


def test_kneser_ney_gives_the_values_computed_by_hand():
    model = count_ngrams("aab", 2)
    # "a" follows two different bytes (none, a), "b" one: n1 + 1 = n2 + 1 = 2, D = 2 / (2 + 4).
    below = (1 / 3) * 2 / 256  # D · kinds / 256
    a, b = (2 - 1 / 3 + below) / 3, (1 - 1 / 3 + below) / 3
    # Three pairs, each once: D = (3 + 1) / (3 + 1 + 2 · (0 + 1)) = 2 / 3.
    a_first, b_after_a = 1 / 3 + (2 / 3) * a, (1 / 3 + (2 / 3) * 2 * b) / 2
    expected = [a_first, (1 / 3 + (2 / 3) * 2 * a) / 2, b_after_a]
    assert 2 ** model.log2_probs("aab") == pytest.approx(expected)
    # "b" never comes first; nothing was seen after a "b"; "c" was never seen.
    expected = [(2 / 3) * b, a, (2 / 3) * 2 * below / 3 / 2]
    assert 2 ** model.log2_probs("bac") == pytest.approx(expected)
    assert model.bits_per_byte("aab") == pytest.approx(-model.log2_probs("aab").mean())


def by_dictionary(data, order):
    """Interpolated Kneser-Ney, one n-gram after the other: (context, byte) → p."""
    padded = [None] * order + list(data)
    grams = [
        Counter(tuple(padded[i - n + 1 : i + 1]) for i in range(order, len(padded)))
        for n in range(1, order + 1)
    ]
    below = [Counter(gram[1:] for gram in longer) for longer in grams[1:]]
    tables = []
    for counts in (*below, grams[-1]):
        once, twice = (sum(c == n for c in counts.values()) + 1 for n in (1, 2))
        after = defaultdict(list)
        for gram, count in counts.items():
            after[gram[:-1]].append(count)
        tables.append((counts, after, once / (once + 2 * twice)))

    def probability(context, byte):
        p = 1 / 256
        for n, (counts, after, discount) in enumerate(tables):
            own = tuple(context[len(context) - n :])
            if own in after:
                left = max(counts[(*own, byte)] - discount, 0)
                p = (left + discount * len(after[own]) * p) / sum(after[own])
        return p

    return lambda text: [
        probability(([None] * order + list(text))[: order + i], byte) for i, byte in enumerate(text)
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_counting_with_arrays_agrees_with_counting_one_by_one(order):
    random = np.random.default_rng(order)
    train, text = (bytes(random.integers(97, 102, size).tolist()) for size in (300, 80))
    text += b"z" + train[:40]
    found = 2 ** count_ngrams(train, order).log2_probs(text)
    assert found == pytest.approx(by_dictionary(train, order)(text), rel=1e-9)


@pytest.mark.parametrize("context", [b"", b"<|begin|><|user|>", b" has the", b"zzz\xff", b"T"])
def test_probabilities_sum_to_one_after_any_context(context):
    model = count_ngrams(story_corpus(20_000, 2_000).train, 6)
    total = sum(2 ** model.log2_probs(context + bytes([byte]))[-1] for byte in range(256))
    assert total == pytest.approx(1, abs=1e-9)


def test_the_order_is_chosen_on_the_training_text_and_no_other():
    corpus = story_corpus(40_000, 4_000)
    model = fit_ngrams(corpus.train)
    assert len(model.tried) == MAX_ORDER
    assert model.tried[model.order - 1] == min(model.tried)
    cut = len(corpus.train) - len(corpus.train) // 10
    parts = corpus.train[:cut], corpus.train[cut:]
    alone = count_ngrams(parts[0], 3)
    padded = 2 ** alone.log2_probs(parts[1])
    assert model.tried[2] == pytest.approx(-np.log2(padded).mean())
    assert model.bits_per_byte(corpus.held_out) < count_ngrams(corpus.train, 2).bits_per_byte(
        corpus.held_out
    )
    assert str(model) == f"{model.order}-grams of bytes, interpolated Kneser-Ney"


def test_random_bytes_cannot_be_foretold():
    random = np.random.default_rng(0)
    train, text = (random.integers(0, 256, size).astype(np.uint8).tobytes() for size in (9999, 999))
    assert 7.9 < -count_ngrams(train, 4).log2_probs(text).mean() < 8.5


def test_an_order_or_a_text_that_cannot_be_counted_is_named():
    for order in (0, MAX_ORDER + 1, 2.0):
        with pytest.raises(ConfigError, match="max_order must be"):
            fit_ngrams(TEXT, order)
    with pytest.raises(DataError, match="5 bytes are too few"):
        fit_ngrams("short")
    with pytest.raises(DataError, match="has 8,000,001 bytes"):
        fit_ngrams("x" * 8_000_001)
