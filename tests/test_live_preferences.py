"""The picture of a preference training says what its reports say."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.toy_preferences import dpo_trainer
from tests.toy_training import toy_trainer
from workbench.errors import ConfigError
from workbench.live import preferences
from workbench.live.preferences import draw_preferences
from workbench.live.run_chart import draw


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


@pytest.fixture(scope="module")
def reports():
    trainer = dpo_trainer(epochs=3, valid=[(3, 4), (5, 2)], valid_every=2)
    return list(trainer)


def test_each_run_is_a_row_and_its_title_says_how_far_it_moved(reports, monkeypatch):
    titles = []
    own = preferences.headline
    monkeypatch.setattr(
        preferences, "headline", lambda f, text: titles.append(text) or own(f, text)
    )
    one = pixels(draw_preferences({"a $\\frac{$ run": reports}))
    two = pixels(draw_preferences({"one": reports, "two": reports[:3]}))
    assert two.shape[0] > 1.5 * one.shape[0]
    assert one[0, 0, 3] == 0  # a ground of its own would hide the page's
    last = reports[-1].extras
    assert f"chosen {last['valid_chosen_shift']:+.0f}, rejected" in titles[0]
    assert titles[1].startswith("Held-out pairs, one: chosen")


def test_runs_without_margins_are_refused(reports):
    for runs in ({}, {"empty": []}, {"other": list(toy_trainer(epochs=1))}):
        with pytest.raises(ConfigError):
            draw_preferences(runs)


def test_the_chart_of_a_run_says_what_its_loss_is_a_mean_of(reports):
    pairs, tokens = pixels(draw(reports)), pixels(draw(list(toy_trainer(epochs=1))))
    empty = pixels(draw([]))
    height = pairs.shape[0] // 2  # the loss's half; its axis name stands at the left edge
    edge = slice(0, 25)
    assert np.array_equal(tokens[:height, edge], empty[:height, edge])
    assert not np.array_equal(pairs[:height, edge], empty[:height, edge])
