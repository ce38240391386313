"""The paired measure of ranks: the same steps, and the figures that are asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests import process
from workbench.backend import usable_cores
from workbench.benchmarks.ranks import RankSpeed, compare_ranks
from workbench.benchmarks.workloads import WORKLOADS
from workbench.runs.launching import rank_environment

SMALL = dataclasses.replace(WORKLOADS["W1"], length=16)


@pytest.mark.long
@pytest.mark.real
def test_both_make_the_same_steps_and_are_ended():
    with process.one_benchmark():
        found = compare_ranks(SMALL, steps=2, layers=1)
    assert len(found.steps) == 2
    assert (found.steps.alone_loss - found.steps.ranks_loss).abs().max() < 1e-4
    assert (found.steps[["alone_seconds", "ranks_seconds"]] > 0).all(axis=None)
    own = psutil.Process().children(recursive=True)
    assert not [child for child in own if "our_peer.py" in " ".join(child.cmdline())]


def test_the_ratio_is_the_median_of_the_pairs():
    seconds = {"alone_seconds": [2.0, 30.0, 4.0], "ranks_seconds": [1.0, 1.0, 4.0]}
    found = RankSpeed(SMALL, 2, 1, pd.DataFrame(seconds))
    assert found.ratio == 2
    assert "2.00 × (median of 3 pairs)" in str(found)


def test_the_baseline_is_told():
    steps = pd.DataFrame({"alone_seconds": [2.0], "ranks_seconds": [1.0]})
    told = "one process with all cores 2.000 s a step, {} BLAS {} each 1.000 s;"
    assert told.format("2 ranks with one", "thread") in str(RankSpeed(SMALL, 2, 1, steps))
    assert told.format("4 ranks with 8", "threads") in str(RankSpeed(SMALL, 4, 8, steps))
    cores = usable_cores()
    alone, ranks = (rank_environment(0, number, Path("hosts")) for number in (1, cores))
    assert alone["OPENBLAS_NUM_THREADS"] == str(cores), "the one process has them all"
    assert ranks["OPENBLAS_NUM_THREADS"] == "1"
