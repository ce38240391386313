"""The paired measure of ranks: the same steps, and the figures that are asked for."""

from __future__ import annotations

import dataclasses

import pandas as pd
import psutil
import pytest

from tests import process
from workbench.benchmarks.ranks import RankSpeed, compare_ranks
from workbench.benchmarks.workloads import WORKLOADS

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
    found = RankSpeed(SMALL, 2, pd.DataFrame(seconds))
    assert found.ratio == 2
    assert "2.00 × (median of 3 pairs)" in str(found)
