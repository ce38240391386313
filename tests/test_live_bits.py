"""The picture of a network that overtakes a baseline says what was measured."""

import io

import numpy as np
import pytest
from PIL import Image

from workbench.data.stories import story_corpus
from workbench.errors import ConfigError
from workbench.evaluation.ngrams import count_ngrams, fit_ngrams
from workbench.live import bits
from workbench.live.bits import draw_bits_per_byte

PROGRESS = [(0, 2.0), (10, 0.9), (20, 0.45)]


@pytest.fixture(scope="module")
def ngrams():
    return fit_ngrams(story_corpus(5_000, 2_000).train, 6)


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


def test_its_title_says_what_both_need(ngrams, monkeypatch):
    titles = []
    own = bits.headline
    monkeypatch.setattr(bits, "headline", lambda f, text: titles.append(text) or own(f, text))
    one = pixels(draw_bits_per_byte(PROGRESS, ngrams, 0.61))
    other = pixels(draw_bits_per_byte(PROGRESS, ngrams, 0.9))
    assert one.shape == other.shape
    assert not np.array_equal(one, other)  # the baseline's line stands elsewhere
    assert one[0, 0, 3] == 0  # a ground of its own would hide the page's
    assert titles[0] == (
        "After 20 steps the network needs 0.45 bits a byte of held-out text, "
        f"{ngrams.order}-grams 0.61"
    )


def test_nothing_to_draw_is_refused(ngrams):
    with pytest.raises(ConfigError, match="no bits to draw"):
        draw_bits_per_byte([], ngrams, 0.6)
    with pytest.raises(ConfigError, match="fit_ngrams"):
        draw_bits_per_byte(PROGRESS, count_ngrams("abcabc", 2), 0.6)
