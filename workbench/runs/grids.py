"""Which values a sweep's notebooks get: a grid, draws from it, or a list."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.errors import ConfigError, check_number, check_whole

MAX_RUNS = 10_000
DRAWS = 100  # tries for each combination that shall differ from those before
NAME_CHARACTERS = 100  # of a run folder, before its digest
MAX_BITS = 10_000  # of a whole number: Python writes no more than 4300 digits
LISTS = (list, tuple, range, np.ndarray)

Parameters = dict[str, object]


@dataclass(frozen=True)
class Between:
    """A parameter that is drawn anew for each run: `Between(1e-5, 1e-2, log=True)`.

    Whole numbers give whole numbers, both ends included.

    Raises:
        ConfigError: not two finite numbers that rise; with `log`, not above 0.
    """

    low: float
    high: float
    log: bool = False  # uniform in the logarithm

    def __post_init__(self):
        for name in ("low", "high"):
            check_number(f"{name} of Between", getattr(self, name))
        if self.low >= self.high or (self.log and self.low <= 0):
            rule = "low < high" + (", both above 0" if self.log else "")
            raise ConfigError(f"Between({self.low}, {self.high}) does not keep {rule}")

    def draw(self, source: random.Random) -> float:
        """One value."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
            value = min(max(value, self.low), self.high)  # exp(log(x)) is not x to the last bit
            return round(value) if whole else value
        return source.randint(self.low, self.high) if whole else source.uniform(self.low, self.high)


def combinations(
    given: Mapping[str, object] | Sequence[Mapping[str, object]],
    samples: int | None = None,
    seed: int = 0,
) -> list[Parameters]:
    """The parameters of each run, as JSON values.

    Args:
        given: name → list of values: every combination, the last name's values varying fastest;
            or a list of the runs' parameters.
        samples: so many different ones, drawn; values may be `Between` then.
        seed: of the draw.

    Raises:
        ConfigError: nothing to run, too much, the same twice, or a value that cannot be passed on.
    """
    check_whole("seed", seed, 0)
    if isinstance(given, Mapping):
        runs = _from_grid(_axes(given), samples, random.Random(seed))
    elif isinstance(given, list | tuple) and all(isinstance(run, Mapping) for run in given):
        if samples is not None:
            raise ConfigError("samples are drawn from a grid, not from a list")
        _check_count(len(given))
        runs = [{str(name): _plain(name, value) for name, value in run.items()} for run in given]
    else:
        raise ConfigError(
            f"a sweep needs parameters, got {_shown(given)}",
            cure="Give name → list of values, or a list of name → value.",
        )
    if not runs:
        raise ConfigError("the sweep has no runs", cure="Name at least one combination.")
    seen = set()
    for run in runs:
        if (key := _key(run)) in seen:
            raise ConfigError(f"{in_words(run)} is there twice", cure="Name each run once.")
        seen.add(key)
    return runs


def folder_name(parameters: Parameters) -> str:
    """A run's folder: its parameters to be read, and their digest; the same whenever asked."""
    text = ",".join(f"{name}={value}" for name, value in parameters.items()) or "defaults"
    safe = re.sub(r"[^\w.+=,-]", "_", text, flags=re.ASCII)[:NAME_CHARACTERS]
    return f"{safe}-{hashlib.sha256(_key(parameters).encode()).hexdigest()[:10]}"


def in_words(parameters: Parameters) -> str:
    """Parameters as a line: `rank=4, learning_rate=0.001`."""
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items()) or "no parameters"


def value_of(text: str) -> object:
    """A value from a command line: a Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def values_of(text: str) -> list[object]:
    """Values from a command line, parted by commas: `1e-3,2e-3`, `[1,2],[3]`, `linear,cosine`."""
    together = value_of(f"[{text}]")
    if isinstance(together, list):
        return together
    return [value_of(part.strip()) for part in text.split(",")]


def _axes(grid: Mapping[str, object]) -> dict[str, list[object] | Between]:
    if not grid:
        raise ConfigError("the grid is empty", cure="Give name → list of values.")
    axes: dict[str, list[object] | Between] = {}
    for name, values in grid.items():
        if not isinstance(values, (*LISTS, Between)):
            raise ConfigError(
                f"{name} must be a list of values, got {_shown(values)}",
                cure=f"A single value is a list of one: {{{name!r}: [value]}}.",
            )
        axes[str(name)] = (
            values if isinstance(values, Between) else [_plain(name, value) for value in values]
        )
        if axes[str(name)] == []:
            raise ConfigError(f"the grid is empty: {name} has no values")
    return axes


def _from_grid(
    axes: dict[str, list[object] | Between], samples: int | None, source: random.Random
) -> list[Parameters]:
    drawn = [name for name, values in axes.items() if isinstance(values, Between)]
    if samples is None:
        if drawn:
            raise ConfigError(f"{drawn[0]} is drawn: say how often", cure="Give samples=….")
        _check_count(math.prod(len(values) for values in axes.values()))
        return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    check_whole("samples", samples, 1)
    _check_count(samples)
    runs: dict[str, Parameters] = {}
    for _ in range(DRAWS * samples):
        run = {
            name: values.draw(source) if isinstance(values, Between) else source.choice(values)
            for name, values in axes.items()
        }
        runs.setdefault(_key(run), run)
        if len(runs) == samples:
            return list(runs.values())
    raise ConfigError(f"the grid gives {len(runs)} different runs, fewer than {samples} samples")


def _check_count(count: int) -> None:
    if count > MAX_RUNS:
        raise ConfigError(
            f"{count} runs are more than {MAX_RUNS}", cure="Draw some of them: samples=…."
        )


def _plain(name: object, value: object) -> object:
    """A value as JSON and papermill have it."""
    try:
        return _as_json(value)
    except (ValueError, RecursionError):  # a text that is no Unicode is a ValueError as well
        raise ConfigError(
            f"{name} cannot be {_shown(value)}",
            cure="Parameters are numbers, strings, True, False, None, and lists or dicts of these.",
        ) from None


def _as_json(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_as_json(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair goes into no file
        return value
    is_number = isinstance(value, float) and math.isfinite(value)
    if isinstance(value, int):
        is_number = value.bit_length() <= MAX_BITS
    if value is None or is_number:
        return value
    raise ValueError


def _shown(value: object) -> str:
    """A value in an error, whatever it is."""
    try:
        return repr(str(value)[:100])
    except (ValueError, RecursionError):
        return f"this {type(value).__name__}: it is too large"


def _key(parameters: Parameters) -> str:
    return json.dumps(parameters, sort_keys=True)
