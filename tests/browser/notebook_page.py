"""A notebook in JupyterLab, driven by keyboard and mouse as a reader would."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

from tests.browser.lab import ROOT, Lab

SCREENSHOTS = ROOT / "build" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDTHS = {"wide": 1600, "narrow": 900}
HEIGHT = 1100
SETTLED_MS = 400  # after a change of theme or width
CONNECTED = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
CONNECTED += "?.connectionStatus == 'connected'"
# Samples the output of one cell at every frame that the browser draws.
WATCH = """index => {
  const output = () => document.querySelectorAll('.jp-Notebook .jp-Cell')[index]
    ?.querySelector('.jp-Cell-outputArea');
  const seen = window.seen = {pictures: [], frames: [], acts: []};
  const act = () => seen.acts.push(Date.now() / 1000);
  document.addEventListener('click', act, true);
  document.addEventListener('keydown', event => event.key === 'Enter' && act(), true);
  const sample = () => {
    const box = output()?.getBoundingClientRect(), image = output()?.querySelector('img');
    const shown = Boolean(image?.complete && image.naturalWidth);
    const live = Boolean(output()?.querySelector('button'));
    if (box) seen.frames.push([box.height, shown, live]);
    if (shown && image.src !== seen.pictures.at(-1)) seen.pictures.push(image.src);
    requestAnimationFrame(sample);
  };
  sample();
}"""


class NotebookPage:
    """One tab with one notebook.

    `errors` collects what the browser's console calls an error, and uncaught exceptions.
    """

    def __init__(self, browser: Browser, lab: Lab, name: str):
        self.lab, self.path = lab, lab.work / name
        self.page: Page = browser.new_page(viewport={"width": WIDTHS["wide"], "height": HEIGHT})
        self.errors: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())  # "leave this page?"
        self.open()

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self) -> None:
        """Load the notebook, with a kernel ready and the file browser closed."""
        token = f"reset&token={self.lab.token}"
        self.page.goto(f"{self.lab.url}/lab/tree/{quote(self.path.name)}?{token}")
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        self.page.wait_for_function(CONNECTED)
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()

    def close(self) -> None:
        """Close the tab; the kernel goes on."""
        self.page.close()

    def cell(self, index: int) -> Locator:
        """A cell, counted from 0."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def prompt(self, index: int) -> str:
        """What stands beside a cell: [ ]:, [*]: or [3]:."""
        return self.cell(index).locator(".jp-InputPrompt").text_content()

    def run(self, index: int) -> None:
        """Run one cell by keyboard."""
        self.command_mode(index)
        self.page.keyboard.press("Shift+Enter")

    def command_mode(self, index: int) -> None:
        """Select a cell, out of its editor: single letters are commands now."""
        self.cell(index).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Escape")

    def run_all(self) -> None:
        """Run every cell by keyboard, through the command palette."""
        self.page.keyboard.press("Control+Shift+c")
        self.page.locator(".lm-CommandPalette-input").fill("Run All Cells")
        self.page.locator(".lm-CommandPalette-item", has_text="Run All Cells").first.wait_for()
        self.page.keyboard.press("Enter")

    def interrupt(self, index: int) -> None:
        """Interrupt the kernel by keyboard: I, I."""
        self.command_mode(index)
        self.page.keyboard.press("i")
        self.page.keyboard.press("i")

    def finished(self, index: int, seconds: float = 30) -> None:
        """Wait until a cell has run."""
        wait_until(lambda: self.prompt(index).strip("[]:").isdigit(), seconds, "the cell runs on")

    def save(self) -> None:
        """Save by keyboard; returns when the file has been written."""
        before = self.path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        wait_until(lambda: self.path.stat().st_mtime_ns > before, 15, "nothing was saved")

    def watch(self, index: int) -> None:
        """Begin to sample what is shown and done; see `seen`."""
        self.page.evaluate(WATCH, index)

    def seen(self) -> dict[str, list]:
        """What was seen: pictures in their order; frames; times at which somebody acted.

        A frame is (height in px, is a picture shown, are buttons shown). Acts are clicks and the
        Enter key, in seconds since 1970.
        """
        return self.page.evaluate("() => window.seen")

    def theme(self, name: str) -> None:
        """Change the theme: Light or Dark."""
        command = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
        self.page.evaluate(command, f"JupyterLab {name}")
        self.page.locator(f"body[data-jp-theme-name='JupyterLab {name}']").wait_for(
            state="attached"
        )

    def photograph(self, name: str, index: int) -> list[Path]:
        """Screenshots on both themes, at both widths, with a cell at the top."""
        taken = []
        for theme in ("Light", "Dark"):
            self.theme(theme)
            for width, pixels in WIDTHS.items():
                self.page.set_viewport_size({"width": pixels, "height": HEIGHT})
                self.cell(index).evaluate("cell => cell.scrollIntoView({block: 'start'})")
                self.page.wait_for_timeout(SETTLED_MS)
                path = SCREENSHOTS / f"{name}-{theme.lower()}-{width}.png"
                self.page.screenshot(path=path)
                taken.append(path)
        self.theme("Light")
        self.page.set_viewport_size({"width": WIDTHS["wide"], "height": HEIGHT})
        return taken


def wait_until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Ask again and again until it holds.

    Raises:
        AssertionError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} after {seconds:.0f} s"
        time.sleep(0.05)
