"""The live panel in JupyterLab: what a reader sees, clicks and finds in the saved file."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tests.browser.notebook_page import wait_until
from tests.browser.watched import (
    AFTER,
    PANEL,
    WIDGET_VIEW,
    Watched,
    png_size,
    run_folder_files,
    saved_pictures,
)

pytestmark = pytest.mark.browser
ENDLESS = 3000  # steps: such a run ends because somebody stops it
FROZEN_SECONDS = 2.5
PICTURES_SECONDS = 120  # limit; a picture comes the rarer the longer it takes
JUMP = 6  # px that the height may change from one frame to the next


@pytest.fixture
def watched(browser, lab, usual_errors, request):
    """Starts a notebook with a panel; at the end the console must be free of errors of ours."""
    started = []

    def start(steps: int = ENDLESS, **options: str) -> Watched:
        started.append(Watched(browser, lab, request.node.name, steps, **options))
        return started[-1]

    yield start
    for notebook in started:
        notebook.close()
        assert set(notebook.page.errors) <= usual_errors


def heights(notebook: Watched) -> tuple[list[float], list[float]]:
    """Height of the panel's output at each frame since the first picture: live, and afterwards."""
    frames = notebook.page.seen()["frames"]
    first = next(number for number, (_, shown, _) in enumerate(frames) if shown)
    return tuple([height for height, _, live in frames[first:] if live is s] for s in (True, False))


def test_pictures_change_and_the_height_stays(watched):
    notebook = watched(panel="prompts=['a'], sample_every=20")
    wait_until(lambda: notebook.pictures() >= 3, PICTURES_SECONDS, "the pictures stand still")
    assert notebook.page.prompt(PANEL) == "[*]:", "it was not running any more"
    notebook.click("Stop")
    notebook.page.finished(PANEL)
    notebook.page.page.wait_for_timeout(500)  # some frames more
    live, final = heights(notebook)
    assert min(len(live), len(final)) > 10, "too few frames to say anything"
    drops = [before - after for before, after in pairwise(live)]
    assert max(drops) <= JUMP, f"the output shrinks by {max(drops)} px at once"
    assert min(live) >= live[0] - JUMP
    assert min(final) >= 0.8 * max(live), f"from {max(live)} px to {min(final)} at the end"


def test_pause_freezes_and_resume_goes_on(watched):
    notebook = watched()
    for _ in range(2):
        moment = notebook.click("Pause")
        notebook.shows("Paused")
        assert notebook.begun_after(moment) <= 1
        assert notebook.stands_still(FROZEN_SECONDS)
        notebook.click("Resume")
        notebook.shows("Training")
        notebook.goes_on()


def test_stop_ends_the_run_and_the_file_stands_alone(watched, lab):
    notebook = watched(after="len(reports), trainer.finished, trainer.stop_reason")
    notebook.goes_on()
    moment = notebook.click("Stop")
    notebook.page.finished(PANEL)
    assert notebook.begun_after(moment) <= 2
    notebook.page.run(AFTER)
    notebook.page.finished(AFTER)
    assert f"({notebook.steps()}, False, '" in notebook.page.cell(AFTER).inner_text()
    notebook.page.save()
    outputs = notebook.saved_outputs()
    (picture,) = saved_pictures(outputs)
    assert min(png_size(picture)) >= 300
    assert not any(WIDGET_VIEW in output.get("data", {}) for output in outputs)
    lab.kill_kernels()
    notebook.page.open()
    assert picture_is_shown(notebook)
    notebook.page.photograph("kernel-dead", PANEL)


def picture_is_shown(notebook: Watched) -> bool:
    """Whether the output shows one loaded picture and no widget that failed to load."""
    image = notebook.output.locator("img")
    image.wait_for()
    failed = notebook.output.get_by_text("widget", exact=False).count()
    return image.count() == 1 and image.evaluate("i => i.naturalWidth > 300") and not failed


def test_closed_tab_shows_live_pictures_again_and_stops(watched):
    notebook = watched()
    notebook.reopen()
    notebook.wait_for_picture()
    already = notebook.pictures()
    wait_until(lambda: notebook.pictures() > already, PICTURES_SECONDS, "they stand still")
    notebook.goes_on()  # the second picture may be of the step that was the last at reopening
    moment = notebook.click("Stop")
    notebook.button("Stop").wait_for(state="detached")
    assert notebook.begun_after(moment) <= 2
    assert picture_is_shown(notebook)


def test_interrupt_leaves_a_trainer_that_goes_on(watched):
    notebook = watched(after="print(trainer.step().step, len(trainer.reports))")
    notebook.goes_on()
    notebook.page.interrupt(PANEL)
    notebook.page.finished(PANEL)
    steps = notebook.steps()
    assert notebook.stands_still(0.5)
    assert picture_is_shown(notebook)
    notebook.page.run(AFTER)
    notebook.page.finished(AFTER)
    assert f"{steps + 1} {steps + 1}" in notebook.page.cell(AFTER).inner_text()
    notebook.page.watch(PANEL)
    notebook.page.run(PANEL)  # the same cell again goes on
    notebook.goes_on()
    assert [report["step"] for report in notebook.reports()] == list(range(1, notebook.steps() + 1))
    notebook.click("Stop")
    notebook.page.finished(PANEL)


def test_learning_rate_typed_is_that_of_the_next_step(watched):
    notebook = watched()
    for typed, expected in {"0.0035": 0.0035, "-1": 0.0035, "2e-3": 0.002}.items():
        moment = notebook.type_rate(typed)
        assert notebook.rate_of_step_after(moment, 2) == pytest.approx(expected), typed
        assert notebook.page.prompt(PANEL) == "[*]:", f"the panel ended at {typed}"
        told = re.compile(rf"learning rate.*{float(typed):g}")
        notebook.output.locator("[role=status]").filter(has_text=told).wait_for()
    rates = {report["learning_rate"] for report in notebook.reports()}
    assert sorted(rates) == pytest.approx([0.002, 0.0035, 0.01])


def test_checkpoint_now_writes_a_folder_and_goes_on(watched):
    notebook = watched()
    before = run_folder_files(notebook.run_dir)
    notebook.click("Checkpoint now")
    wait_until(
        lambda: any(
            name.endswith(".safetensors") for name in run_folder_files(notebook.run_dir) - before
        ),
        15,
        "no checkpoint",
    )
    notebook.goes_on()
    notebook.output.get_by_text("checkpoint", exact=False).first.wait_for()


def test_buttons_work_by_keyboard(watched):
    notebook = watched()
    notebook.button("Pause").focus()
    for keys, state in ((["Space"], "Paused"), (["Tab", "Space"], "Training")):
        for key in keys:
            notebook.page.page.keyboard.press(key)
        notebook.shows(state)
    notebook.goes_on()
    for key in ("Tab", "Space"):  # on to the next button: Stop
        notebook.page.page.keyboard.press(key)
    notebook.page.finished(PANEL)
    assert notebook.stands_still(0.5)


def test_panel_reads_on_both_themes_and_widths(watched):
    notebook = watched(panel="prompts=['a', '<b>b</b> $x'], sample_every=5")
    notebook.goes_on(12)
    notebook.page.photograph("running", PANEL)
    notebook.click("Pause")
    notebook.shows("Paused")
    notebook.page.photograph("paused", PANEL)
    for pixels in (900, 1600):
        notebook.page.page.set_viewport_size({"width": pixels, "height": 1100})
        notebook.page.page.wait_for_timeout(300)
        wider = notebook.output.evaluate(
            """output => [...output.querySelectorAll('*')].filter(part =>
                 part.getBoundingClientRect().right > output.getBoundingClientRect().right + 1 ||
                 part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).overflowX
                   != 'visible').map(part => part.className || part.tagName)"""
        )
        assert wider == [], f"at {pixels} px"
