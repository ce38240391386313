"""Run folders as trainers and sweeps write them, without a training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd

from tests.toy import write_jsonl
from tests.toy_panel import toy_report
from workbench.runs.store import RunFolder, as_config
from workbench.runs.table import runs
from workbench.tuning.config import TrainConfig


def rows(steps: int, total: int | None = None, **changes: object) -> list[dict]:
    """Metrics of a run's steps."""
    return [
        dataclasses.asdict(toy_report(step)) | {"total_steps": total or steps} | changes
        for step in range(1, steps + 1)
    ]


def toy_run(folder: Path, steps: int = 3, total: int | None = None, **settings: object) -> Path:
    """A run that nobody writes any more: configuration, lock, and metrics of its steps."""
    config = as_config(train=TrainConfig(**settings), model="toy", data="capitals")
    RunFolder(folder, config)
    if steps:
        write_jsonl(folder / "metrics.jsonl", rows(steps, total))
    return folder


def write_job(folder: Path, state: str = "finished", **job: object) -> Path:
    """What a sweep writes into a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps({"state": state, **job}))
    return folder


def row_of(root: Path, name: str = "run") -> pd.Series:
    """The table's row of one run."""
    (row,) = (row for _, row in runs(root).iterrows() if row["name"] == name)
    return row
