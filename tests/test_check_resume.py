"""A training that does not go on as if it had never stopped is caught, and its fault is named."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from tests.mutants_resume import Loop, ScheduleFromZero, WeightsOnly
from tests.toy_checks import failure
from workbench.errors import ConfigError
from workbench.probes.resuming import HEADINGS, check_resume


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_right_training_resumes_bit_for_bit(steps):
    report = check_resume(Loop, steps)
    assert report.ok, str(report)
    assert [finding.check for finding in report.findings] == list(HEADINGS)
    assert {finding.status for finding in report.findings} == {"ok"}


def test_what_the_optimizer_lost_is_named():
    found = failure(check_resume(WeightsOnly), "resumed optimizer")
    assert "step ends at 2 instead of 4" in found.detail
    assert "moments are lost" in found.cause
    found = failure(check_resume(ScheduleFromZero), "resumed optimizer")
    assert "learning_rate ends at" in found.detail
    assert "schedule" in found.cause


def test_without_an_optimizer_the_heading_does_not_apply():
    def start(saved):
        loop = Loop(saved)
        return SimpleNamespace(step=loop.step, save=loop.save, model=loop.model)

    report = check_resume(start)
    assert report.ok, str(report)
    assert report.status("resumed optimizer") == "not applicable"


def test_a_training_that_does_not_repeat_itself_is_said_so():
    count = iter(range(100))

    class Fresh(Loop):
        def seed(self):
            mx.random.seed(next(count))

    report = check_resume(Fresh)
    assert "from nothing twice" in failure(report, "resumed losses").detail
    assert report.failed_checks == {"resumed losses"}


def test_ambient_random_states_are_as_before():
    mx.random.seed(3)
    np.random.seed(3)
    before = mx.random.state[0].tolist(), np.random.get_state()[1].tolist()
    check_resume(Loop, 2)
    assert (mx.random.state[0].tolist(), np.random.get_state()[1].tolist()) == before


def test_losses_may_be_arrays_or_reports():
    class Reporting(Loop):
        def step(self):
            loss = mx.array(super().step())
            return loss if self.position % 2 else type("Report", (), {"loss": loss})()

    assert check_resume(Reporting).ok


def raising(*_):
    """A method that is broken."""
    raise RuntimeError("planted <b>")


@pytest.mark.parametrize("method", ["save", "restore"])
def test_a_broken_resumption_is_a_finding(method):
    report = check_resume(type("Broken", (Loop,), {method: raising}))
    assert "planted" in failure(report, "resumed position").detail
    assert report.status("resumed losses") == "not applicable"
    assert "planted &lt;b&gt;" in report._repr_html_()


def test_a_step_that_raises_after_the_stop_is_a_finding():
    class Finished(Loop):
        def restore(self, saved):
            super().restore(saved)
            self.step = raising

    found = failure(check_resume(Finished), "resumed position")
    assert "update 3 raised RuntimeError" in found.detail


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (None, "start must be a function"),
        (raising, r"start\(None\) raised RuntimeError: planted"),
        (lambda saved: object(), r"without \.step\(\)"),
        (lambda saved: SimpleNamespace(step=raising, save=raising), r"without a \.model"),
        (type("Broken", (Loop,), {"step": raising}), "update 1 raised"),
        (type("NoLoss", (Loop,), {"step": lambda self: None}), "update 1 raised"),
    ],
)
def test_a_training_that_cannot_be_made_is_a_clear_error(start, says):
    with pytest.raises(ConfigError, match=says):
        check_resume(start)


@pytest.mark.parametrize("steps", [1, 0, 2.5, True])
def test_a_bad_number_of_steps_is_a_clear_error(steps):
    with pytest.raises(ConfigError, match="steps must be a whole number"):
        check_resume(Loop, steps)
