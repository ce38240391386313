"""The picture of a killed run says whether it is the same as one that nobody touched."""

import dataclasses

import pytest

from tests.toy_training import toy_trainer
from workbench.errors import ConfigError
from workbench.live import survival


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, in order."""
    drawn = []
    monkeypatch.setattr(survival, "png", lambda figure: drawn.append(figure) or b"")
    return drawn


@pytest.fixture(scope="module")
def reports():
    return list(toy_trainer(epochs=4))


def test_equal_runs_are_said_to_be_equal(figures, reports):
    survival.draw_survival(reports, reports[:5], reports, first_step=5)
    assert figures[0].get_suptitle() == "All 8 losses are equal to the last bit"
    lines = {line.get_label(): list(line.get_xdata()) for line in figures[0].axes[0].lines}
    assert lines["until it was killed"] == [1, 2, 3, 4, 5]
    assert lines["after the checkpoint"] == [5, 6, 7, 8]


def test_the_first_different_step_is_named(figures, reports):
    other = [*reports[:6], dataclasses.replace(reports[6], loss=9.0), *reports[7:]]
    survival.draw_survival(reports, reports[:5], other, first_step=5)
    survival.draw_survival(reports, reports[:5], reports[:7], first_step=5)
    titles = [figure.get_suptitle() for figure in figures]
    assert titles == ["The losses differ from step 7", "7 steps against 8"]


def test_a_run_without_steps_is_refused(reports):
    with pytest.raises(ConfigError, match="no steps to draw"):
        survival.draw_survival(reports, [], reports, 1)
