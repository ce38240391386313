"""The figure of what rounding does to an export."""

import pytest

from workbench.errors import ConfigError
from workbench.export.drift import Drift
from workbench.live import exports

KEPT, DROWNED = Drift(0.14, 0.03, 0.02), Drift(0.14, 2.0, 0.1)


def test_it_says_which_exports_keep_the_adapter():
    finding = exports._finding({"8 bits": KEPT, "4 bits": DROWNED}, 0.14)
    assert finding == (
        "The adapter is kept by 8 bits; 4 bits: rounding moves 14 × as far (bound 2)"
    )
    assert exports._finding({"4 bits": DROWNED}, 0.14).startswith("The adapter is kept by none")
    assert exports._finding({"8 bits": KEPT}, 0.14) == "The adapter is kept by 8 bits"


def test_every_export_has_its_bar_and_the_adapter_its_line(monkeypatch):
    kept = []
    monkeypatch.setattr(exports, "png", lambda figure: kept.append(figure) or b"")
    exports.draw_drift({"8 bits": KEPT, "4 $\\frac{$ bits": DROWNED})
    axes = kept[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.03, 2.0]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    assert tuple(axes.lines[0].get_xdata()) == (0.14, 0.14)
    assert [text.get_text() for text in axes.texts] == [
        "0.03; 2 % of the adapter lost",
        "2; 10 % of the adapter lost",
    ]


def test_it_is_a_picture():
    assert exports.draw_drift({"8 $ bits": KEPT, "4 bits": DROWNED}).startswith(b"\x89PNG")


@pytest.mark.parametrize("drifts", [{}, {"8 bits": KEPT, "4 bits": Drift(None, 0.1, None)}])
def test_without_an_adapters_move_there_is_nothing_to_draw(drifts):
    with pytest.raises(ConfigError, match="no adapter's move to compare"):
        exports.draw_drift(drifts)
