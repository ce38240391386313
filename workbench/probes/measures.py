"""What the checks measure, as numbers for a picture: causality, positions, the KV cache.

Each takes any MLX causal language model and leaves it as it was; differences are shares of the
largest logit, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd

from workbench.errors import ConfigError
from workbench.probes.model_checks.caches import in_pieces
from workbench.probes.model_checks.positions import continued
from workbench.probes.model_checks.sequence import moved_by_each_token
from workbench.probes.model_checks.subject import LENGTH, SAME, Subject, difference, prepared

TOLERANCE = SAME[mx.float32]  # differences up to this share are rounding


def causality_matrix(model: nn.Module, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """How far each logit moves when one token of a random row is changed.

    Returns:
        (T, T): entry (t, s) is the largest change of a logit at position s when token t changes.
        A causal model has zeros where s < t.
    """
    with prepared(model):
        subject = Subject(model)
        return moved_by_each_token(subject, subject.tokens(1, length, seed))


def position_moves(
    model: nn.Module, gaps: Sequence[int], length: int = LENGTH, seed: int = 0
) -> pd.DataFrame:
    """How far logits move when a KV cache misstates its offset by some positions.

    Returns:
        One row a gap: `gap`, where only the second half of the row stands further on, and
        `shift`, where all of it does.

    Raises:
        ConfigError: the model has no KV cache.
    """
    rows = []
    with prepared(model):
        subject = _with_cache(model)
        tokens = subject.tokens(1, length, seed)
        for gap in gaps:
            moves = []
            for past in (length // 2, 0):
                apart = (continued(subject, tokens, past, g) for g in (gap, 0))
                moves.append(difference(*apart))
            rows.append(moves)
    return pd.DataFrame(rows, index=pd.Index(gaps, name="positions"), columns=["gap", "shift"])


def cache_drift(model: nn.Module, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """(T,) difference at each position between token by token with a cache, and no cache.

    Raises:
        ConfigError: the model has no KV cache.
    """
    with prepared(model):
        subject = _with_cache(model)
        tokens = subject.tokens(1, length, seed)
        plain, cached = subject.logits(tokens), in_pieces(subject, tokens, [1] * length)
    return np.abs(cached - plain)[0].max(axis=-1) / (np.abs(plain).max() or 1.0)


def _with_cache(model: nn.Module) -> Subject:
    subject = Subject(model)
    if subject.make_cache() is None:
        raise ConfigError(f"{type(model).__name__} has no KV cache to measure")
    return subject
