"""The pictures of a provenance loss say what its numbers say."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.toy_provenance import PROVENANCE, provenance_trainer
from tests.toy_training import toy_trainer
from workbench.errors import ConfigError
from workbench.live import provenance
from workbench.live.provenance import draw_surface, draw_terms, draw_weighting

GROUPS = ["old", "new", "a $\\frac{$"] * 2
LOSSES = {
    "before": dict.fromkeys(GROUPS, 4.0),
    "plain": {"old": 2.0, "new": 1.5, "a $\\frac{$": 3.0},
    "weighted": {"old": 1.25, "new": 1.75, "a $\\frac{$": 3.0},
}


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


@pytest.fixture
def documents():
    columns = ["authority_weight", "provenance_entropy"]
    weights = [2.5, 0.5, 0.75, 1.5, 0.25, 0.5]
    return pd.DataFrame(PROVENANCE, columns=columns).assign(group=GROUPS, row_weight=weights)


@pytest.fixture
def titles(monkeypatch):
    found, own = [], provenance.headline
    monkeypatch.setattr(provenance, "headline", lambda f, text: found.append(text) or own(f, text))
    return found


def test_the_surface_is_drawn_with_its_documents(documents):
    whole, part = pixels(draw_surface(documents)), pixels(draw_surface(documents.iloc[:3]))
    assert whole[0, 0, 3] == 0  # a ground of its own would hide the page's
    assert not np.array_equal(whole, part)
    assert not np.array_equal(whole, pixels(draw_surface(documents, alpha=2.3)))


def test_the_title_of_the_terms_says_what_reaches_the_parameters(titles):
    reports = list(provenance_trainer("additive", epochs=3))
    assert pixels(draw_terms(reports)).shape[2] == 4
    added = np.mean([report.extras["provenance"] for report in reports])
    assert titles == [f"The term adds {added:.1f} to the loss, and 0 to the gradient"]


def test_reports_without_the_term_are_refused():
    for reports in ([], list(toy_trainer(epochs=1)), list(provenance_trainer(epochs=1))):
        with pytest.raises(ConfigError, match="no provenance term to draw"):
            draw_terms(reports)


def test_the_title_of_the_weights_names_who_gains_and_who_pays(documents, titles):
    content = pixels(draw_weighting(documents, LOSSES))
    assert content[0, 0, 3] == 0
    heaviest, lightest = "old (-0.75 nats)", "new (+0.25)"
    assert titles == [f"Weighted against plain: {heaviest} over {lightest}"]
    draw_weighting(documents.assign(row_weight=[0.25, 2.5, 1.0] * 2), LOSSES)
    assert titles[1] == "Weighted against plain: new (+0.25 nats) over old (-0.75)"


def test_what_cannot_be_drawn_is_refused(documents):
    with pytest.raises(ConfigError, match="need row_weight"):
        draw_weighting(documents.drop(columns="row_weight"), LOSSES)
    with pytest.raises(ConfigError, match="two trainings"):
        draw_weighting(documents, {k: LOSSES[k] for k in ("before", "plain")})
    with pytest.raises(ConfigError, match="two trainings"):
        draw_weighting(documents, {**LOSSES, "other": {"old": 1.0}})
    with pytest.raises(ConfigError, match="need a row"):
        draw_surface(documents.iloc[:0])
