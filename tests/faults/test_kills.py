"""Nothing acknowledged is lost: killed anywhere, refused by the disk, and then gone on with."""

from __future__ import annotations

import errno
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.faults.cases import count
from tests.faults.killing import count_boundaries, failing, killed_at, killed_in_step, train
from tests.faults.processes import error_of, forked, result_of

SAMPLE = 5  # of the long suite's cases, in `make test`
AT_BOUNDARIES, AT_MOMENTS, IN_STEPS = 44, 12, 8
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> tuple[dict[str, object], list[str]]:
    """The result of a training that nobody disturbed, and every change of the disk in it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert forked(partial(train, None), folder / "plain") == 0
    assert forked(partial(count_boundaries, folder / "run"), folder / "count") == 0
    read = [result_of(folder / name) for name in ("plain", "count")]
    return read[0], read[1]


def assert_goes_on(
    run_dir: Path, results: Path, undisturbed: dict[str, object], fault: str = "SIGKILL, resumed"
) -> None:
    """The run goes on to the end, equal to the bit, and leaves nothing behind."""
    acknowledged = _rows(run_dir)
    assert forked(partial(train, run_dir), results) == 0, error_of(results)
    assert result_of(results) == undisturbed
    rows = _rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["loss"] for row in rows[: len(acknowledged)]] == [r["loss"] for r in acknowledged]
    stray = list(run_dir.rglob(".tmp-*"))
    count(fault, "result", len(stray))
    assert not stray, stray


def _rows(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def spread(count: int, of: int) -> list[int]:
    """`count` of the numbers 1 … `of`, evenly."""
    return sorted({round(x) for x in np.linspace(1, of, count)})


def check_boundary_kills(count, undisturbed, tmp_path):
    result, boundaries = undisturbed
    for number in spread(count, len(boundaries)):
        run_dir, results = tmp_path / f"{number}", tmp_path / f"{number}-results"
        assert forked(partial(killed_at, number, run_dir), results) == -9, boundaries[number - 1]
        assert_goes_on(run_dir, results, result)


def test_some_kills_at_boundaries(undisturbed, tmp_path):
    check_boundary_kills(SAMPLE, undisturbed, tmp_path)


@pytest.mark.long
def test_kills_at_boundaries(undisturbed, tmp_path):
    assert len(undisturbed[1]) >= AT_BOUNDARIES
    check_boundary_kills(AT_BOUNDARIES, undisturbed, tmp_path)


@pytest.mark.long
def test_kills_at_random_moments(undisturbed, tmp_path):
    random, killed = np.random.default_rng(0), 0
    for number in range(20 * AT_MOMENTS):
        run_dir, results = tmp_path / f"{number}", tmp_path / f"{number}-results"
        seconds = random.uniform(0.02, 0.25)  # about as long as the training takes
        code = forked(partial(train, run_dir), results, kill_after=seconds)
        if code == 0 or not run_dir.exists():
            continue  # too late, or before it had begun: nothing was killed
        assert code == -9
        assert_goes_on(run_dir, results, undisturbed[0])
        killed += 1
        if killed == AT_MOMENTS:
            return
    pytest.fail(f"only {killed} trainings were killed on the way")


def test_kills_in_mid_step(undisturbed, tmp_path):
    for step in range(1, IN_STEPS + 1):
        run_dir, results = tmp_path / f"{step}", tmp_path / f"{step}-results"
        assert forked(partial(killed_in_step, step, run_dir), results) == -9
        assert len(_rows(run_dir)) == step
        assert_goes_on(run_dir, results, undisturbed[0])


def check_disk_faults(count, undisturbed, tmp_path):
    result, boundaries = undisturbed
    for at, number in enumerate(spread(count, len(boundaries))):
        code, lasting = ERRORS[at % len(ERRORS)], at % 2 == 1
        run_dir, results = tmp_path / f"{number}", tmp_path / f"{number}-results"
        what = f"{boundaries[number - 1]} {errno.errorcode[code]} lasting={lasting}"
        done = forked(partial(failing, number, code, lasting, run_dir), results)
        assert done == 0, what + error_of(results)
        told = result_of(results)
        for text in told.pop("errors"):
            assert str(run_dir) in text, what
        assert told == result, what
        assert_goes_on(run_dir, results / "again", result, "disk refuses, resumed")


def test_some_disk_faults(undisturbed, tmp_path):
    check_disk_faults(SAMPLE, undisturbed, tmp_path)


@pytest.mark.long
def test_disk_faults(undisturbed, tmp_path):
    check_disk_faults(24, undisturbed, tmp_path)
