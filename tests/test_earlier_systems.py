"""The README's table of earlier systems says what the committed notebooks recorded."""

from __future__ import annotations

import re
import runpy

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
