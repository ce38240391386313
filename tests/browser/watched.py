"""A notebook whose second cell is a live panel, and what can be asked of it."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path

import nbformat
from playwright.sync_api import Browser, Locator

from tests.browser.lab import Lab
from tests.browser.notebook_page import NotebookPage, wait_until
from tests.browser.slow_trainer import step_starts

SETUP, PANEL, AFTER = 0, 1, 2  # cells
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
EMBEDDED_PNG = re.compile(r"data:image/png;base64,")
FIRST_PICTURE_SECONDS = 60


class Watched:
    """A notebook page with a panel that is running.

    Args:
        browser: Chromium.
        lab: JupyterLab.
        name: of the notebook and of its run folder.
        steps: of the run; long enough that it does not end by itself, or short so that it does.
        panel: the panel's arguments after the trainer, as code.
        after: the notebook's last cell.
    """

    def __init__(
        self, browser: Browser, lab: Lab, name: str, steps: int, panel: str = "", after: str = "1"
    ):
        self.browser, self.lab, self.name = browser, lab, f"{name}.ipynb"
        self.run_dir = lab.work / name
        setup = [
            "import workbench as wb",
            "from tests.browser.slow_trainer import slow_trainer",
            f"trainer = slow_trainer({name!r}, steps={steps})",
        ]
        watch = f"reports = await wb.LivePanel(trainer{', ' + panel if panel else ''}).watch()"
        lab.write_notebook(self.name, ["\n".join(setup), watch, after])
        self.page = NotebookPage(browser, lab, self.name)
        self.page.run(SETUP)
        self.page.finished(SETUP)
        self.page.watch(PANEL)
        self.page.run(PANEL)
        self.wait_for_picture()

    @property
    def output(self) -> Locator:
        """The panel's output."""
        return self.page.cell(PANEL).locator(".jp-Cell-outputArea")

    def wait_for_picture(self) -> None:
        """Until a picture is shown."""
        wait_until(lambda: self.pictures() > 0, FIRST_PICTURE_SECONDS, "no picture")

    def pictures(self) -> int:
        """How many different pictures were shown since the page was opened."""
        return len(self.page.seen()["pictures"])

    def steps(self) -> int:
        """Steps on disk."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def reports(self) -> list[dict]:
        """What the run wrote of each step."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def button(self, name: str) -> Locator:
        """A button of the panel."""
        return self.output.get_by_role("button", name=name, exact=True)

    def shows(self, text: str) -> None:
        """Wait until the panel shows this and nothing else in one place."""
        self.output.get_by_text(text, exact=True).wait_for()

    def click(self, name: str) -> float:
        """Click a button; returns when the browser saw it (seconds since 1970)."""
        before = len(self.page.seen()["acts"])
        self.button(name).click()
        acts = self.page.seen()["acts"]
        assert len(acts) == before + 1, f"one click, seen {len(acts) - before} times"
        return acts[-1]

    def type_rate(self, text: str) -> float:
        """Type into the learning-rate field, then Enter; returns when that was."""
        self.output.locator("input").first.click()
        self.page.page.keyboard.press("Control+a")
        self.page.page.keyboard.type(text)
        self.page.page.keyboard.press("Enter")
        return self.page.seen()["acts"][-1]

    def begun_after(self, moment: float) -> int:
        """Steps that began after a moment."""
        return sum(start > moment for start in step_starts(self.run_dir))

    def goes_on(self, steps: int = 3, seconds: float = 15) -> None:
        """Wait until some more steps have been made."""
        target = self.steps() + steps
        wait_until(lambda: self.steps() >= target, seconds, "the steps stand still")

    def rate_of_step_after(self, moment: float, number: int) -> float:
        """Learning rate of the n-th step that began after a moment, counted from 1."""
        index = len(step_starts(self.run_dir)) - self.begun_after(moment) + number - 1
        wait_until(lambda: self.steps() > index, 15, "the steps stand still")
        return self.reports()[index]["learning_rate"]

    def stands_still(self, seconds: float) -> bool:
        """Whether no step begins within `seconds`."""
        before = len(step_starts(self.run_dir))
        time.sleep(seconds)
        return len(step_starts(self.run_dir)) == before

    def reopen(self) -> None:
        """Save, close the tab, open it again; the kernel goes on."""
        self.page.save()
        self.page.close()
        errors = self.page.errors
        self.page = NotebookPage(self.browser, self.lab, self.name)
        self.page.errors += errors
        self.page.watch(PANEL)

    def close(self) -> None:
        """Close the tab and end the kernel."""
        self.page.close()
        self.lab.kill_kernels()

    def saved_outputs(self) -> list[nbformat.NotebookNode]:
        """Outputs of the panel's cell in the file; no cell may hold a widget's state."""
        notebook = nbformat.read(self.lab.work / self.name, as_version=4)
        assert "widgets" not in notebook.metadata
        return notebook.cells[PANEL].outputs


def saved_pictures(outputs: list[nbformat.NotebookNode]) -> list[bytes]:
    """Every PNG in the outputs, of its own or inside HTML."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            found.append(base64.b64decode(data["image/png"]))
        for part in EMBEDDED_PNG.split(data.get("text/html", ""))[1:]:
            found.append(base64.b64decode(re.match(r"[\w+/=]+", part)[0]))
    return found


def png_size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG (PNG specification, section 11.2.1)."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n"), "not a PNG"
    assert picture.endswith(b"IEND\xaeB`\x82"), "cut off"
    return int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])


def run_folder_files(folder: Path) -> set[str]:
    """Names of all files and folders below a run folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
