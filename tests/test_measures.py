"""The numbers behind the pictures are those of the properties."""

from __future__ import annotations

import mlx.nn as nn
import numpy as np
import pytest

from tests.mutants_attention import IgnoresOffset, KeepsTheLast, NoMask, with_attention, with_cache
from tests.toy import toy_model
from workbench.errors import ConfigError
from workbench.probes.measures import TOLERANCE, cache_drift, causality_matrix, position_moves


def test_causality_matrix_is_upper_triangular():
    matrix = causality_matrix(toy_model(), length=7)
    assert matrix.shape == (7, 7)
    assert np.tril(matrix, -1).max() == 0
    assert np.triu(matrix)[np.triu_indices(7)].min() > TOLERANCE
    assert np.tril(causality_matrix(with_attention(NoMask), length=7), -1).max() > 0.01


def test_a_gap_moves_the_logits_and_a_shift_does_not():
    moves = position_moves(toy_model(), gaps=[3, 9])
    assert list(moves.index) == [3, 9]
    assert moves["gap"].min() > 0.01
    assert moves["shift"].max() <= TOLERANCE
    ignored = position_moves(with_attention(IgnoresOffset), gaps=[3])
    assert ignored["gap"].max() <= TOLERANCE


def test_cache_drift_begins_where_the_past_is_lost():
    assert cache_drift(toy_model()).max() <= TOLERANCE
    drift = cache_drift(with_cache(KeepsTheLast))
    assert drift[0] <= TOLERANCE
    assert drift[1:].min() > 0.01


def test_a_model_without_cache_is_refused():
    with pytest.raises(ConfigError, match="no KV cache"):
        cache_drift(nn.Embedding(8, 8))
