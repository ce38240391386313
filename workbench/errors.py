"""Errors for users: what happened, where, and the cure."""

from __future__ import annotations

import math
import reprlib
import sys

LARGEST_SEED = 2**64 - 1


class WorkbenchError(ValueError):
    """Base of every error that a user of the workbench can cause or cure.

    Args:
        what: one clause that names the thing that is wrong.
        where: the file, line, tensor or field it was found in.
        cure: what to do about it.
    """

    def __init__(self, what: str, *, where: object = "", cure: str = ""):
        self.what, self.where, self.cure = what, str(where), cure
        message = f"{self.where}: {what}" if self.where else what
        super().__init__(f"{message}. {cure}" if cure else message)

    def __reduce__(self):
        rebuild = _rebuild, (type(self), self.what, self.where, self.cure)
        return rebuild


def _rebuild(kind: type[WorkbenchError], what: str, where: str, cure: str) -> WorkbenchError:
    return kind(what, where=where, cure=cure)


class ConfigError(WorkbenchError):
    """A setting or a model's config.json is missing, out of range or unsupported."""


class SourceError(WorkbenchError):
    """A model's name or place does not lead to files."""


class FileFormatError(WorkbenchError):
    """A file is truncated, malformed or not what its name says."""


class WeightsError(WorkbenchError):
    """The tensors of a file and the parameters of a network do not fit together."""


class TokenizerError(WorkbenchError):
    """A tokenizer is missing, unsupported or does not fit its model."""


class DataError(WorkbenchError):
    """A row, or a whole data set, cannot be trained on."""


class TrainingError(WorkbenchError):
    """A training step went wrong; the weights are those before the step."""


class NotFiniteError(TrainingError):
    """Loss or gradients of a step are NaN or infinite; the step was not made."""


class BenchmarkError(WorkbenchError):
    """A peer of the benchmark cannot be measured, or did not do the same work."""


class EvaluationError(WorkbenchError):
    """A model cannot be evaluated: its numbers are none, or the tool for it is missing."""


class RunError(WorkbenchError):
    """A run folder cannot be used."""


class RankError(WorkbenchError):
    """Ranks of one training do not fit together, or one of them has failed."""

    status = 1  # of the process that failed, as a shell counts it


class BackendWarning(UserWarning):
    """MLX will work on this machine, but far below its speed."""


class MemoryWarning(UserWarning):
    """The process comes near to what the machine can give, or has been stopped there."""


class ResumeWarning(UserWarning):
    """A run goes on, but not from its newest checkpoint, or not bit for bit."""


class AdapterWarning(UserWarning):
    """An adapter fits by its shapes, but says something that cannot be held to here."""


class SettingsWarning(UserWarning):
    """Settings of another tool are used, and some of them mean something else here."""


class FallbackWarning(UserWarning):
    """A faster or smaller form cannot be used here; the plain one is, with equal results."""


class ObjectiveWarning(UserWarning):
    """A part of the loss is reported, and trains nothing."""


class IndexWarning(UserWarning):
    """The index of many runs cannot be used; the runs' folders were read instead."""


class ObserverWarning(UserWarning):
    """An observer of a training failed; the training goes on without it."""


def check_whole(name: str, value: object, smallest: int, largest: float = math.inf) -> None:
    """Raise ConfigError unless a setting is a whole number from `smallest` to `largest`."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not smallest <= value <= largest:
        top = f" to {largest}" if is_whole and value > largest else ""
        got = reprlib.repr(value)
        raise ConfigError(f"{name} must be a whole number from {smallest}{top}, got {got}")


def check_seed(name: str, value: object) -> None:
    """Raise ConfigError unless a setting is a seed that MLX's random numbers can start from."""
    check_whole(name, value, 0, LARGEST_SEED)


def check_number(name: str, value: object, smallest: float = -math.inf) -> None:
    """Raise ConfigError unless a setting is a finite number from `smallest`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # The comparison refuses NaN, and a whole number that no float holds.
    if not is_number or not max(smallest, -sys.float_info.max) <= value <= sys.float_info.max:
        floor = "finite" if smallest == -math.inf else f"finite, from {smallest:g}"
        raise ConfigError(f"{name} must be a number, {floor}; got {value!r}")


def check_kind(name: str, value: object, kind: type | tuple[type, ...], cure: str) -> None:
    """Raise ConfigError unless an argument is of a kind; the cure says where one comes from."""
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        got = type(value).__name__
        raise ConfigError(f"{name} must be a {kinds}, got {got}", cure=cure)


def is_text(value: object) -> bool:
    """Whether a value is a text that UTF-8 can hold: half of a surrogate pair it cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
