"""Observers that hand each step on to TensorBoard or trackio, where these are installed."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from types import ModuleType

from workbench.errors import ConfigError
from workbench.tuning.config import StepReport
from workbench.tuning.observers import Observer

LEFT_OUT = ("step", "total_steps")  # the axis


def to_tensorboard(folder: str | os.PathLike) -> Observer:
    """An observer that writes every number of a report to TensorBoard's event files.

    Each step is on disk before the next one begins; `tensorboard --logdir folder` shows them.

    Raises:
        ConfigError: tensorboard is not installed, or the folder cannot be written.
    """
    summary = _imported("tensorboard.summary", "tensorboard")
    try:
        writer = summary.Writer(os.fspath(folder))
    except OSError as error:
        raise ConfigError(f"cannot be written ({error.strerror})", where=folder) from None

    def write(report: StepReport) -> None:
        for name, value in scalars(report).items():
            writer.add_scalar(name, value, report.step)
        writer.flush()

    return write


def to_trackio(
    project: str, name: str | None = None, config: Mapping[str, object] | None = None
) -> Observer:
    """An observer that logs every number of a report with trackio.

    On this machine, unless trackio's own settings (TRACKIO_SPACE_ID) name another place;
    `trackio show --project …` shows it. The run is finished with the last step; one that is
    stopped is finished when Python ends.

    Args:
        project: trackio's project.
        name: of the run; one of that name goes on. None: trackio makes one.
        config: settings to keep with it, such as `dataclasses.asdict(trainer.config)`.

    Raises:
        ConfigError: trackio is not installed.
    """
    trackio = _imported("trackio", "trackio")
    run = trackio.init(
        project=project,
        name=name,
        resume="allow",
        config=dict(config or {}),
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )

    def log(report: StepReport) -> None:
        run.log(scalars(report), step=report.step)
        if report.step == report.total_steps:
            run.finish()

    return log


def scalars(report: StepReport) -> dict[str, float]:
    """The numbers of a report by name, without those that it has not; truth values as 0 and 1.

    What an objective measures beside its loss (`extras`) stands among them under its own name.
    """
    values = {**dataclasses.asdict(report), **(report.extras or {})}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name not in LEFT_OUT
    }


def _imported(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{extra} is not installed ({error})",
            cure=f'pip install "mlx-lora-workbench[{extra}]"',
        ) from None
