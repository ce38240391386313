"""A run drawn again from its folder."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import RunError
from workbench.live.chart import draw
from workbench.runs.store import METRICS_NAME, read_metrics
from workbench.tuning.config import StepReport

if TYPE_CHECKING:
    from IPython.display import Image


def show_run(folder: str | os.PathLike) -> Image:
    """Draw a run's loss and memory from its folder.

    The run may have finished, been killed, or be going on in another process: what its metrics
    hold so far is drawn.

    Raises:
        RunError: the folder holds no metrics yet, or they are damaged or of another kind.
    """
    from IPython.display import Image

    return Image(draw(read_reports(folder)), format="png", width=960)


def read_reports(folder: str | os.PathLike) -> list[StepReport]:
    """The reports of a run's steps, from its metrics.

    Raises:
        RunError: there are none yet, or they are damaged or of another kind.
    """
    table = read_metrics(folder)
    if table.empty:
        raise RunError("has not finished a step yet", where=folder)
    known = {field.name: field for field in fields(StepReport)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    missing = sorted(needed - set(table))
    if missing:
        where = Path(folder) / METRICS_NAME
        raise RunError(f"lacks {', '.join(missing)}: these are other metrics", where=where)
    table = table[[name for name in known if name in table]]
    present = table.astype(object).where(table.notna(), None)
    return [StepReport(**row) for row in present.to_dict("records")]
