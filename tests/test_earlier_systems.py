"""The README's table of earlier systems says what the committed notebooks recorded."""

from __future__ import annotations

import re
import runpy

import workbench as wb
from tests.process import ROOT

PAGE = runpy.run_path(str(ROOT / "docs" / "earlier_systems.py"))


def test_the_readme_holds_the_table_of_the_committed_notebooks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert PAGE["BEGIN"] in readme
    assert PAGE["with_table"](readme) == readme, "run: python docs/earlier_systems.py"


def test_every_figure_comes_from_a_notebook():
    for row in PAGE["ROWS"]:
        assert "{" in row.here
        assert "{" not in row.line()
        assert not re.search(r"half|third|quarter", row.here), "a share written by hand"


def test_the_plan_of_the_8b_run_is_that_of_its_preset():
    mac = wb.Machine("a Mac with 192 GB", 192 * 10**9, gpu=True)
    planned = wb.preset("llama-3.1-8b-rank2").plan(mac).peak_bytes
    (row,) = (row for row in PAGE["ROWS"] if row.notebook == "05_watch_memory")
    assert f"planned, not measured here: {planned / 1e9:.1f} GB of arrays" in row.line()
