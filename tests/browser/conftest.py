"""One JupyterLab, one Chromium, a fresh notebook a test; skipped where there is no Chromium."""

from __future__ import annotations

import pytest
from playwright.sync_api import sync_playwright

from tests.browser.lab import Lab
from tests.browser.notebook_page import CHROMIUM, FLAGS, SCREENSHOTS, NotebookPage


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """JupyterLab; only where there is a browser."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.stop()


@pytest.fixture(scope="session")
def usual_errors(browser, lab):
    """Console errors of a notebook that has nothing of ours: JupyterLab's own."""
    lab.write_notebook("nothing.ipynb", ["1 + 1", "import ipywidgets; ipywidgets.Button()"])
    page = NotebookPage(browser, lab, "nothing.ipynb")
    for index in range(2):
        page.run(index)
        page.finished(index)
    page.save()
    page.close()
    return set(page.errors)
