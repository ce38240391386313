"""Trying a faster form on the actual network, with a few tokens, before it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

ROWS, LENGTH = 2, 6  # of the tokens that are tried
# Differences up to this share of the largest logit are rounding, by the weights' dtype.
SAME = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def probe_tokens(model: nn.Module) -> np.ndarray:
    """Token ids (ROWS, LENGTH) that every embedding of the network has, unlike if it has many."""
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    rows = [m.weight.shape[0] for _, m in model.named_modules() if isinstance(m, embeddings)]
    known = min(rows, default=2)
    replace = known < ROWS * LENGTH
    chosen = np.random.default_rng(0).choice(known, ROWS * LENGTH, replace=replace)
    return chosen.reshape(ROWS, LENGTH).astype(np.int32)


def first_array(output: object) -> mx.array | None:
    """The logits in what a network returned: itself, or the first of a tuple."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, mx.array) else None


def difference(model: nn.Module, found: mx.array, expected: mx.array) -> str:
    """How two sets of logits (N, V) differ, "" if by rounding only."""
    if found.shape != expected.shape:
        return f"logits {found.shape} for {expected.shape}"
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    apart = (mx.abs(found - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-30)).item()
    dtypes = {array.dtype for _, array in tree_flatten(model.parameters())}
    bound = max((SAME[dtype] for dtype in dtypes if dtype in SAME), default=SAME[mx.float32])
    return "" if apart <= bound else f"logits that differ by {apart:.1e} of the largest"


def described(error: Exception) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Try a network in evaluation mode; each module's mode and the random stream come back."""
    # One of mlx-lm's networks (recurrent_gemma) has no mode until it gets one.
    modes = [(module, vars(module).get("_training", True)) for module in model.modules()]
    start = mx.random.state[0]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module._set_training_mode(training)
        if mx.random.state[0] is not start:
            set_random_state(start)


def set_random_state(key: mx.array) -> None:
    """Draw from a key from now on: what `mx.random.state[0]` held."""
    high, low = key.tolist()  # MLX's state cannot be assigned; the seed of a key restores it
    mx.random.seed((high << 32) | low)
