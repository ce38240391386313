"""Find the runs below a folder, and read what a table says of each of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from workbench.errors import RunError
from workbench.models.regular_files import parse_json
from workbench.runs import lock
from workbench.runs.digest import Digest, open_plain, read_on
from workbench.runs.store import CONFIG_NAME, JOB_FOLDER, JOB_NAME, METRICS_NAME, RESULTS_NAME

FILES = (CONFIG_NAME, METRICS_NAME, RESULTS_NAME, JOB_NAME)
ABSENT = "-"
MAX_DEPTH = 4  # folders inside one another, from the root to a run
MAX_FOLDERS = 100_000
MAX_JSON_BYTES = 1_000_000
MAX_VALUES = 200  # of one file
MAX_NAME, MAX_TEXT = 100, 300  # characters
OLDEST, LATEST = 0, 2**33  # seconds since 1970 that a date can stand for
NUMBERS = (  # a table's columns of them
    "steps", "total_steps", "loss", "best_valid_loss", "best_step", "tokens_per_second", "seconds",
    "peak_bytes", "process_bytes",
)  # fmt: skip
FIRST, LAST = ("name", "state", "started", *NUMBERS), ("problem", "folder")
RESULT, CONFIG, PARAMETER = "result.", "config.", "parameters."  # what names begin with
STATES_OF_JOBS = {  # what a sweep says of an attempt → a run's state; else its metrics decide
    "finished": "finished",
    "failed": "failed",
    "killed": "failed",
    "cancelled": "stopped",
}


class Record(NamedTuple):
    """What is known of a run; None where it has no such number."""

    name: str  # its folder, from the root on
    stamp: str = ""  # of its files, when they were read
    problem: str = ""
    job_state: str = ""
    started: float | None = None  # seconds since 1970
    steps: int = 0
    total_steps: int | None = None
    loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    num_results: int = 0
    names: tuple[str, ...] = ()  # of its further columns: results, configuration, parameters
    values: Sequence[object] = ()  # theirs: numbers, texts, truth values, None


def find_runs(root: str | os.PathLike) -> dict[str, str]:
    """Every run at most `MAX_DEPTH` folders below a root, with a stamp that changes when it does.

    Links and hidden folders are left out; folders inside a run are not looked at.

    Returns:
        name, from the root on → stamp; "." is the root itself.

    Raises:
        RunError: the root is no folder, or holds too many.
    """
    root = os.fspath(root)
    found: dict[str, str] = {}
    waiting, seen = [("", 0)], 0
    while waiting:
        name, depth = waiting.pop()
        folder = os.path.join(root, name) if name else root
        stamp = stamp_of(folder)
        if stamp:
            found[name or "."] = stamp
            continue
        below = list(_folders(folder, needed=not name)) if depth < MAX_DEPTH else []
        seen += len(below)
        if seen > MAX_FOLDERS:
            cure = "Give the folder that the runs are in."
            raise RunError(f"holds more than {MAX_FOLDERS} folders", where=root, cure=cure)
        waiting += [(f"{name}/{own}" if name else own, depth + 1) for own in below]
    return found


def _folders(folder: str, needed: bool) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                    yield entry.name
    except OSError as error:
        if needed:
            cure = "A run's folder is made by wb.Trainer(…, run_dir='runs/name')."
            raise RunError(
                f"cannot be listed ({error.strerror})", where=folder, cure=cure
            ) from None


def stamp_of(folder: str | os.PathLike) -> str:
    """Times, sizes and inodes of a run's files; empty if the folder holds no run."""
    marks = []
    for name in FILES:
        try:
            status = os.lstat(f"{folder}/{name}")
            marks.append(f"{status.st_mtime_ns}:{status.st_size}:{status.st_ino}")
        except OSError:
            marks.append(ABSENT)
    config, metrics, results, job = marks
    if job == results == ABSENT:  # a model's folder has a config.json as well
        if config == ABSENT:
            return ""
        if metrics == ABSENT and not os.path.lexists(f"{folder}/{lock.LOCK_NAME}"):
            return ""
    return " ".join(marks)


def state_of(record: Record, folder: str | os.PathLike) -> str:
    """damaged, finished, failed, running, stopped (before its last step), or empty."""
    of_job = STATES_OF_JOBS.get(record.job_state)
    if record.problem and of_job != "failed":
        return "damaged"
    all_steps = record.total_steps is not None and record.steps >= record.total_steps
    if all_steps and not record.job_state:
        return "finished"
    if of_job != "finished" and is_running(folder):
        return "running"
    if of_job is not None:
        return of_job
    if record.steps or record.job_state == "running":  # and nobody is at it
        return "stopped"
    return "finished" if record.num_results and not record.job_state else "empty"


def is_running(folder: str | os.PathLike) -> bool:
    """Whether a trainer, or the notebook of a sweep, writes to a run folder now."""
    return lock.is_held(folder) or lock.is_held(os.path.join(folder, JOB_FOLDER))


def read_record(root: str, name: str, stamp: str, known: str) -> tuple[Record, str]:
    """Read a run's files; of its metrics only what was added.

    Args:
        root: the folder that `name` starts from.
        name: of the run.
        stamp: of its files, taken before.
        known: digest of its metrics as JSON, from an earlier time; or empty.

    Returns:
        the record, and the digest as JSON for the next time.
    """
    folder, marks = os.path.join(root, name), dict(zip(FILES, stamp.split(" ")))
    problems: list[str] = []
    config, results, job = (
        _read_object(folder, file, problems) if marks[file] != ABSENT else {}
        for file in (CONFIG_NAME, RESULTS_NAME, JOB_NAME)
    )
    digest = Digest()
    if marks[METRICS_NAME] != ABSENT:
        try:
            digest = read_on(os.path.join(folder, METRICS_NAME), Digest.from_json(known))
        except (OSError, ValueError) as error:
            problems.append(f"{METRICS_NAME} {_reason(error)}")
    if digest.problem:
        problems.append(f"{METRICS_NAME}: {digest.problem}")
    columns = _columns(config, results, job)
    job_state = job.get("state") if isinstance(job.get("state"), str) else ""
    if job_state in ("failed", "killed") and isinstance(job.get("error"), str):
        problems.append(printable(job["error"], MAX_TEXT))
    record = Record(
        name, stamp, "; ".join(problems), printable(job_state, 20), _started(marks),
        digest.steps, digest.total_steps, digest.loss, digest.best_valid_loss, digest.best_step,
        digest.tokens_per_second, digest.seconds or None, digest.peak_bytes, digest.process_bytes,
        sum(name.startswith(RESULT) for name in columns), tuple(columns), list(columns.values()),
    )  # fmt: skip
    return record, digest.as_json()


def _columns(
    config: Mapping[str, object], results: Mapping[str, object], job: Mapping[str, object]
) -> dict[str, object]:
    """A table's further columns: results first, then the configuration, then parameters."""
    columns = flat(results, RESULT)
    for name, value in flat(config).items():
        taken = name in (*FIRST, *LAST) or name.startswith((RESULT, PARAMETER))
        columns[CONFIG + name if taken else name] = value
    if isinstance(job.get("parameters"), dict):
        columns |= flat(job["parameters"], PARAMETER)
    return columns


def _read_object(folder: str, name: str, problems: list[str]) -> dict[str, object]:
    try:
        with open_plain(os.path.join(folder, name)) as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"is larger than {MAX_JSON_BYTES} bytes")
        value = parse_json(content)
        if not isinstance(value, dict):
            raise ValueError("holds no JSON object")
        return value
    except (OSError, ValueError) as error:
        problems.append(f"{name} {_reason(error)}")
        return {}


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return printable(text if text.startswith(("is ", "holds ")) else f"is damaged ({text})", 200)


def _started(marks: Mapping[str, str]) -> float | None:
    """When the run's first file was written: nothing changes it later."""
    for name in (CONFIG_NAME, JOB_NAME, RESULTS_NAME):
        if marks[name] != ABSENT:
            seconds = int(marks[name].split(":")[0]) / 1e9
            return seconds if OLDEST <= seconds < LATEST else None
    return None


def flat(content: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested objects as one level, `train.learning_rate`: numbers, texts, truth values and None.

    Lists become texts; names and texts are cut, and what cannot be shown is written out.
    """
    found: dict[str, object] = {}
    for name, value in content.items():
        name = prefix + printable(name, MAX_NAME)
        if isinstance(value, dict) and value and len(name) < MAX_NAME:
            found |= flat(value, f"{name}.")
        else:
            found[name] = _plain(value)
        if len(found) >= MAX_VALUES:
            break
    return dict(list(found.items())[:MAX_VALUES])


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) >= 2**63:  # more than a table's numbers can be
        return float(value) if abs(value) < 2**1000 else math.inf * (1 if value > 0 else -1)
    if isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return printable(text, MAX_TEXT)


def printable(text: str, most: int) -> str:
    """A text without line ends, control characters and the like, which are written out; cut."""
    cut = text[:most] + ("…" if len(text) > most else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
