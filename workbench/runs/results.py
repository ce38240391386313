"""Numbers that a run comes to, kept in its folder beside its metrics."""

from __future__ import annotations

import json
import os
from pathlib import Path

from workbench.errors import ConfigError, FileFormatError, RunError
from workbench.models.files import read_json, replacing
from workbench.runs.records import MAX_NAME, MAX_VALUES
from workbench.runs.store import RESULTS_NAME

MAX_TEXT = 1000  # characters


def record_results(run_dir: str | os.PathLike, **numbers: object) -> Path:
    """Keep what a run came to, such as `accuracy=0.93`; `runs` shows it as `result.accuracy`.

    Names that are there already get the new value, others stay as they are. The file is replaced
    whole, or not at all.

    Args:
        run_dir: the run's folder; made if needed.
        numbers: numbers, texts, truth values or None; NaN and infinity as they are.

    Returns:
        the file, `results.json`.

    Raises:
        ConfigError: a value is something else, or there are too many.
        RunError: the file that is there is damaged, or cannot be written.
    """
    path = Path(run_dir) / RESULTS_NAME
    values = {name: _plain(name, value) for name, value in numbers.items()}
    try:
        known = read_json(path) if os.path.lexists(path) else {}
        merged = known | values
        if len(merged) > MAX_VALUES:
            raise ConfigError(f"a run keeps at most {MAX_VALUES} results, not {len(merged)}")
        with replacing(path) as temporary:
            text = json.dumps(merged, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
    except FileFormatError as error:
        raise RunError(error.what, where=error.where, cure=error.cure) from error
    return path


def _plain(name: str, value: object) -> object:
    """A value as JSON can hold it: those of numpy and MLX become Python's.

    Raises:
        ConfigError: there is no such form.
    """
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ConfigError(f"{name[:MAX_NAME]!r} cannot name a result")
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ConfigError(f"{name} is a text of more than {MAX_TEXT} characters")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    raise ConfigError(f"{name} must be a number or a text, not {kind}", cure="Give its mean.")
