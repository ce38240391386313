"""The picture of what more machines would gain says what was expected."""

import io

import numpy as np
import pytest
from PIL import Image

from workbench.errors import ConfigError
from workbench.live import scaling
from workbench.live.scaling import draw_scaling
from workbench.tuning.scaling import predict_scaling


def curves(latency):
    links = {"slow": (1e6, latency), "fast": (1e9, latency)}
    return {
        "small": {
            link: [predict_scaling(1.0, 1e5, *costs, n) for n in (1, 2, 4)]
            for link, costs in links.items()
        }
    }


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


def test_its_title_says_what_the_slowest_and_the_fastest_link_give(monkeypatch):
    titles = []
    own = scaling.headline
    monkeypatch.setattr(scaling, "headline", lambda f, text: titles.append(text) or own(f, text))
    one, other = pixels(draw_scaling(curves(0.0))), pixels(draw_scaling(curves(0.1)))
    assert one.shape == other.shape
    assert not np.array_equal(one, other)
    assert one[0, 0, 3] == 0  # a ground of its own would hide the page's
    assert titles[0] == "4 machines · small: 2.5 to 4.0 ×"


@pytest.mark.parametrize("nothing", [{}, {"job": {}}, {"job": {"link": []}}])
def test_nothing_to_draw_is_refused(nothing):
    with pytest.raises(ConfigError, match="no scaling to draw"):
        draw_scaling(nothing)
