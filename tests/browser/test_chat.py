"""The chat in JupyterLab: typed, streamed, stopped, compared, ended; what the file keeps."""

from __future__ import annotations

import nbformat
import pytest
from playwright.sync_api import Locator

from tests.browser.notebook_page import NotebookPage, wait_until
from tests.browser.watched import WIDGET_VIEW

pytestmark = pytest.mark.browser
SETUP, CHAT, AFTER = 0, 1, 2  # cells
BASE = """
import mlx.core as mx
import workbench as wb
from tests.toy import toy_base
from workbench.live.chat import chat
base = toy_base(hidden_size=256, intermediate_size=512, num_hidden_layers=16)  # slow enough to see
wb.add_lora(base.model, wb.LoRAConfig(rank=4))
mx.random.seed(2)  # others may end the first answer at once
for _, module in base.model.named_modules():
    if "lora_b" in module:
        module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
mx.eval(base.model.parameters())
"""
BEYOND = """output => [...output.querySelectorAll('*')].filter(part =>
  part.getBoundingClientRect().right > output.getBoundingClientRect().right + 1)
  .map(part => part.className || part.tagName)"""


class Chatting:
    """A notebook whose second cell is an open chat."""

    def __init__(self, browser, lab, name: str, settings: str = ""):
        self.lab, self.name = lab, f"{name}.ipynb"
        cell = f"talk = await chat(base, temperature=1.0{settings})"
        after = "[(turn.question, sorted(turn.answers)) for turn in talk], talk[0].stopped"
        lab.write_notebook(self.name, [BASE, cell, after])
        self.page = NotebookPage(browser, lab, self.name)
        self.page.run(SETUP)
        self.page.finished(SETUP, 60)
        self.page.run(CHAT)
        self.button("End").wait_for()

    @property
    def output(self) -> Locator:
        """The chat."""
        return self.page.cell(CHAT).locator(".jp-Cell-outputArea")

    def button(self, name: str) -> Locator:
        """A button of the chat."""
        return self.output.get_by_role("button", name=name, exact=True)

    def ask(self, text: str) -> None:
        """Type a question and press Enter."""
        field = self.output.get_by_placeholder("Ask something")
        field.click()
        self.page.page.keyboard.type(text)
        self.page.page.keyboard.press("Enter")
        self.output.get_by_text(text, exact=True).wait_for()

    def answers(self) -> list[str]:
        """The texts of all answers."""
        return self.output.locator("[role=log] div[style*=grid] > div").all_inner_texts()

    def answered(self, cells: int = 1) -> None:
        """Wait until nothing is being written, and there are so many answers."""
        wait_until(lambda: len(self.answers()) >= cells, 60, "no answer")
        self.output.locator("button.workbench-idle", has_text="Stop").wait_for()

    def save(self) -> None:
        """Save by keyboard, which a widget's field would keep to itself."""
        self.page.command_mode(SETUP)
        self.page.save()

    def saved(self) -> list[dict]:
        """The chat's outputs in the file."""
        self.save()
        notebook = nbformat.read(self.lab.work / self.name, as_version=4)
        assert "widgets" not in notebook.metadata
        return notebook.cells[CHAT].outputs


@pytest.fixture
def chatting(browser, lab, usual_errors, request):
    """Opens a chat; at the end the console must be free of errors of ours."""
    opened = []

    def start(settings: str = "") -> Chatting:
        opened.append(Chatting(browser, lab, request.node.name, settings))
        return opened[-1]

    yield start
    for chat in opened:
        chat.page.close()
        chat.lab.kill_kernels()
        assert set(chat.page.errors) <= usual_errors


def test_a_question_streams_is_stopped_and_the_file_keeps_the_talk(chatting):
    chat = chatting(", max_tokens=450")
    chat.ask("What <b>is</b> $x$?")
    lengths = set()
    wait_until(
        lambda: lengths.add(len("".join(chat.answers()))) or len(lengths) > 4, 30, "no stream"
    )
    chat.button("Stop").click()
    chat.output.get_by_text("stopped", exact=True).wait_for()
    chat.page.photograph("chat-stopped", CHAT)
    assert 0 < len(chat.answers()[0]) < 440
    chat.output.get_by_label("max tokens").fill("5")
    chat.output.get_by_placeholder("Ask something").click()
    chat.ask("again")
    chat.answered(2)
    chat.button("End").click()
    chat.page.finished(CHAT)
    chat.page.run(AFTER)
    chat.page.finished(AFTER)
    assert "('again', ['with adapter'])],\n True" in chat.page.cell(AFTER).inner_text()
    outputs = chat.saved()
    assert not any(WIDGET_VIEW in output.get("data", {}) for output in outputs)
    assert "What &lt;b&gt;is" in outputs[0]["data"]["text/html"]
    chat.lab.kill_kernels()
    chat.page.open()
    chat.output.get_by_text("again", exact=True).wait_for()
    assert chat.output.locator("button").count() == 0
    assert chat.output.get_by_text("Error displaying widget").count() == 0


def test_sides_are_compared_cleared_and_switched(chatting):
    chat = chatting(", max_tokens=30, adapter='both'")
    chat.ask("first")
    chat.answered(2)
    left, right = chat.answers()
    assert left.startswith("with adapter")
    assert right.startswith("without adapter")
    boxes = chat.output.locator("[role=log] div[style*=grid] > div")
    assert boxes.nth(0).bounding_box()["y"] == boxes.nth(1).bounding_box()["y"]
    chat.page.photograph("chat-both", CHAT)
    chat.button("without").click()
    chat.ask("second")
    chat.answered(3)
    assert len(chat.answers()) == 3
    chat.ask("x" * 700)
    chat.output.get_by_text("no answer").wait_for()
    chat.page.photograph("chat-error", CHAT)
    for pixels in (900, 1600):
        chat.page.page.set_viewport_size({"width": pixels, "height": 1100})
        chat.page.page.wait_for_timeout(300)
        assert chat.output.evaluate(BEYOND) == [], f"at {pixels} px"
    chat.button("Clear").click()
    wait_until(lambda: chat.answers() == [], 10, "the talk stays")
    chat.ask("third")
    chat.answered(1)
    chat.button("End").click()
    chat.page.finished(CHAT)
    chat.page.photograph("chat-ended", CHAT)


def test_an_interrupt_ends_it_and_a_reopened_tab_goes_on(chatting, browser, lab):
    chat = chatting(", max_tokens=20")
    chat.ask("before")
    chat.answered(1)
    chat.save()
    chat.page.close()
    errors = chat.page.errors
    chat.page = NotebookPage(browser, lab, chat.name)
    chat.page.errors += errors
    chat.ask("after")
    chat.answered(2)
    chat.page.page.locator("[data-command='notebook:interrupt-kernel']").first.click()
    wait_until(lambda: chat.output.locator("button").count() == 0, 10, "buttons stay")
    chat.output.get_by_text("after", exact=True).wait_for()
