"""The panel in a notebook's cell: widgets while a browser answers, plain outputs in the end."""

from __future__ import annotations

import base64
import types

import ipywidgets
import nbformat
import pytest
from ipywidgets.widgets.widget import _instances
from nbclient import NotebookClient

from tests.toy_panel import toy_report
from tests.toy_training import toy_trainer
from workbench.live import views
from workbench.live.controls import VIEW, Controls
from workbench.live.history import History
from workbench.live.outputs import HTML, PNG
from workbench.live.panel import LivePanel
from workbench.live.tiles import Status
from workbench.live.views import CellView, Face

SIGNATURE = b"\x89PNG"


class Output:
    """Stands in for one output of a cell: the bundles that were put into it."""

    def __init__(self, slots: list[Output]):
        self.bundles, self.shown = [], False
        slots.append(self)

    def show(self, data, metadata=None):
        self.bundles.append(dict(data))
        self.shown = True

    def show_picture(self, png, size, text):
        self.show({PNG: png})


@pytest.fixture
def outputs(monkeypatch):
    """The three outputs of the next CellView."""
    slots: list[Output] = []
    monkeypatch.setattr(views, "Slot", lambda: Output(slots))
    monkeypatch.setattr(CellView, "_retired", None)
    return slots


@pytest.fixture
def said():
    """What the widgets asked for; a list of what was clicked or typed."""
    return []


@pytest.fixture
def controls(said):
    """Widgets without a browser; whatever is still open is closed afterwards."""
    before = set(_instances)
    names = ("Pause", "Resume", "Stop", "Checkpoint now")
    actions = {name: (lambda name=name: said.append(name), "tip") for name in names}
    yield Controls(actions, said.append, 1e-3)
    for key in set(_instances) - before:
        _instances[key].close()


def face(steps: int, state: str = "Training", samples: str = "") -> Face:
    history = History([toy_report(step) for step in range(1, steps + 1)])
    return Face(Status(state, steps, 30, 1.0), history, samples)


def widgets_of(controls: Controls, kind: type) -> list:
    """All widgets of a kind that are in the panel's box."""
    found, left = [], [controls._box]
    while left:
        widget = left.pop(0)
        left += getattr(widget, "children", ())
        found += [widget] if isinstance(widget, kind) else []
    return found


def test_plain_cell_shows_numbers_then_picture_then_samples(outputs):
    view = CellView(None)
    view.open(face(0, samples="<table>0</table>"))
    view.refresh(face(2))
    view.close(face(30, "Finished", samples="<table>9</table>"))
    numbers, picture, samples = outputs
    assert "30 / 30" in numbers.bundles[-1][HTML]
    assert picture.bundles[-1][PNG].startswith(SIGNATURE)
    assert samples.bundles[-1][HTML] == "<table>9</table>"


def test_plain_cell_is_refreshed_rarely(outputs):
    view = CellView(None)
    view.open(face(0))
    for step in range(1, 20):
        view.refresh(face(step))
    assert len(outputs[1].bundles) == 1
    assert not outputs[2].shown, "no samples, no output for them"


def test_widgets_are_replaced_by_plain_outputs_in_the_end(outputs, controls):
    view = CellView(controls, certain=True)
    view.open(face(0, samples="<table></table>"))
    assert [VIEW in output.bundles[-1] for output in outputs] == [True] * 3
    view.close(face(30, "Finished", samples="<table>9</table>"))
    for output, kind in zip(outputs, (HTML, PNG, HTML)):
        assert len(output.bundles) == 2
        assert VIEW not in output.bundles[-1]
        assert kind in output.bundles[-1]


def test_widgets_show_the_final_state_to_a_reopened_tab_without_buttons(outputs, controls):
    view = CellView(controls, certain=True)
    view.open(face(0))
    assert widgets_of(controls, ipywidgets.Button)
    view.close(face(30, "Finished"))
    assert not widgets_of(controls, ipywidgets.Button)
    (heading,) = widgets_of(controls, ipywidgets.HTML)
    assert "Finished" in heading.value
    assert controls._picture.value == outputs[1].bundles[-1][PNG]


def test_the_next_panel_closes_what_the_last_one_left(outputs, controls):
    before = set(_instances)
    view = CellView(controls, certain=True)
    view.open(face(0))
    view.close(face(1))
    assert set(_instances) < before
    CellView(None).open(face(0))
    assert not _instances


def test_without_an_answer_from_a_browser_plain_outputs_take_over(outputs, controls, monkeypatch):
    view = CellView(controls)
    view.open(face(0))
    spent = view.draw_seconds
    view.refresh(face(1), now=True)
    assert VIEW in outputs[0].bundles[-1], "patience"
    monkeypatch.setattr(views, "PATIENCE", 0.0)
    view.refresh(face(2), now=True)
    assert VIEW in outputs[0].bundles[-1], "one long step is no silence"
    view.refresh(face(3), now=True)
    assert HTML in outputs[0].bundles[-1]
    assert PNG in outputs[1].bundles[-1]
    assert view.draw_seconds > spent
    assert not _instances


def test_with_an_answer_the_widgets_stay(outputs, controls, monkeypatch):
    monkeypatch.setattr(views, "PATIENCE", 0.0)
    view = CellView(controls)
    controls._answer.value = 1  # as the browser's link does
    view.open(face(0))
    view.refresh(face(1), now=True)
    assert VIEW in outputs[0].bundles[-1]


def test_buttons_and_field_ask_for_what_they_say(controls, said):
    buttons = widgets_of(controls, ipywidgets.Button)
    for button in buttons:
        button.click()
    (field,) = widgets_of(controls, ipywidgets.FloatText)
    field.value = 0.5
    assert said == ["Pause", "Resume", "Stop", "Checkpoint now", 0.5]


def test_the_button_that_would_change_nothing_is_pale(controls):
    pale = {}
    for paused in (False, True):
        controls.show_numbers("", None, paused)
        buttons = widgets_of(controls, ipywidgets.Button)
        pale[paused] = [b.description for b in buttons if "workbench-idle" in b._dom_classes]
    assert pale == {False: ["Resume"], True: ["Pause"]}


def test_buttons_of_the_panel_set_flags_only(monkeypatch):
    trainer = toy_trainer(steps=2)
    shell = types.SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": True}})
    monkeypatch.setattr("workbench.live.panel.kernel_shell", lambda: shell)
    panel = LivePanel(trainer)
    controls = panel._choose_view()._controls
    pause, resume, stop, checkpoint = widgets_of(controls, ipywidgets.Button)
    pause.click()
    assert panel.paused
    resume.click()
    assert not panel.paused
    checkpoint.click()
    stop.click()
    assert trainer.stop_reason
    assert trainer.steps_done == 0
    controls.retire()
    controls.close()


SETUP = """
import asyncio, os, signal
import workbench as wb
from tests.toy_training import FailAt, fail, interrupt, toy_trainer
from workbench.live.panel import LivePanel
from workbench.live.runs import show_run
"""
WHOLE = """
trainer = toy_trainer(steps=6, run_dir="run", valid=[9], valid_every=2)
await LivePanel(trainer, ["What <b>is</b> $x$?"], max_new_tokens=2).watch()
"""
AGAIN = "await LivePanel(trainer).watch()"
FAILING = """
try:
    await LivePanel(toy_trainer(steps=6, loss_fn=FailAt(3, fail))).watch()
except RuntimeError as error:
    seen = str(error)
seen
"""
IN_A_STEP = """
trainer = toy_trainer(steps=6, loss_fn=FailAt(3, interrupt))
made = await LivePanel(trainer).watch()
len(made), trainer.stop_reason, next(iter(trainer)).step
"""
IN_A_PAUSE = """
panel = LivePanel(toy_trainer(steps=6))
def later():
    panel.pause()
    loop.call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
loop = asyncio.get_running_loop()
loop.call_soon(later)
made = await panel.watch()
await asyncio.sleep(0)
panel.trainer.stop_reason, len(made) == panel.trainer.steps_done < 6
"""
WIDGETS = "await LivePanel(toy_trainer(steps=3), controls=True).watch()"
SHOWN = 'show_run("run")'


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> list[list[dict]]:
    """Outputs of a notebook's cells, run as papermill runs them, in one kernel."""
    sources = [SETUP, WHOLE, AGAIN, FAILING, IN_A_STEP, IN_A_PAUSE, SHOWN, WIDGETS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    folder = tmp_path_factory.mktemp("cells")
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(views.__file__).rsplit("/workbench/", 1)[0])
        client.execute()
    return [cell.outputs for cell in notebook.cells]


def kinds(outputs: list[dict]) -> list[str]:
    """What a reader sees of each output."""
    order = (VIEW, HTML, PNG, "text/plain")
    return [next(kind for kind in order if kind in output["data"]) for output in outputs]


def test_papermill_gets_one_picture_and_no_widget(executed):
    outputs = executed[1]
    assert kinds(outputs) == [HTML, PNG, HTML]
    assert base64.b64decode(outputs[1]["data"][PNG]).startswith(SIGNATURE)
    assert "6 / 6" in outputs[0]["data"][HTML]
    assert "Finished" in outputs[0]["data"]["text/plain"]
    assert "<b>is" not in outputs[2]["data"][HTML]


def test_a_finished_trainer_is_shown_again(executed):
    assert kinds(executed[2]) == [HTML, PNG, HTML]
    assert "made before" in executed[2][0]["data"][HTML]
    assert executed[2][1]["data"][PNG] == executed[1][1]["data"][PNG]


def test_a_failed_step_leaves_its_picture(executed):
    assert kinds(executed[3]) == [HTML, PNG, "text/plain"]
    assert "Failed" in executed[3][0]["data"][HTML]
    assert "planted" in executed[3][2]["data"]["text/plain"]


@pytest.mark.parametrize(
    ("cell", "result"), [(4, "(3, 'interrupted', 4)"), (5, "('interrupted', True)")]
)
def test_an_interrupt_is_a_stop_and_the_cell_goes_on(executed, cell, result):
    assert kinds(executed[cell]) == [HTML, PNG, "text/plain"]
    assert "Stopped: interrupted" in executed[cell][0]["data"][HTML]
    assert executed[cell][2]["data"]["text/plain"] == result


def test_a_run_drawn_from_its_folder_shows_the_same_picture(executed):
    assert kinds(executed[6]) == [HTML, PNG, HTML]
    assert executed[6][1]["data"][PNG] == executed[1][1]["data"][PNG]
    assert executed[6][2]["data"][HTML] == executed[1][2]["data"][HTML]


def test_widgets_that_were_asked_for_leave_no_view(executed):
    assert kinds(executed[7]) == [HTML, PNG]
