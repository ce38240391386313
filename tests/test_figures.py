"""What all pictures share."""

import pytest

from workbench.live.figures import headline, new_figure

LONG = "Highest accuracy: 1 at learning rate 0.003, rank 16, and in 2 more; $cost_{usd} not asked"


@pytest.mark.parametrize("width", [4, 6, 20])
def test_a_headline_takes_as_many_lines_as_it_needs(width):
    figure = new_figure(width, 3)
    headline(figure, LONG)
    (title,) = figure.texts
    figure.draw_without_rendering()
    place = title.get_window_extent()
    assert place.x0 >= 0
    assert place.x1 <= figure.bbox.width
    assert " ".join(title.get_text().split("\n")) == LONG
    assert ("\n" in title.get_text()) == (width < 20)
