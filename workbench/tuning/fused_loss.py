"""Head and cross-entropy in one: never a whole (positions, V).

The gradient of the hidden states is made in the forward pass, chunk by chunk, while the logits are
there (Wijmans et al. 2024, Cut Your Losses; Hsu et al. 2024, Liger Kernel, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from workbench.errors import ConfigError
from workbench.models.forms import exponential
from workbench.models.structure import find_layers
from workbench.probes.planning.losses import chunk_positions

ChunkLoss = Callable[[mx.array, dict, mx.array], mx.array]


def fused_cross_entropy(model: nn.Module, hidden_states: mx.array, targets: mx.array) -> mx.array:
    """Sum of cross-entropy of `model.head(hidden_states)`, with some positions at a time.

    Any head that treats positions one by one: tied, quantised, adapted, frozen or trained. What
    trains outside the decoder layers is taken to be part of it, and gets its gradient here too:
    for an embedding that is not tied, that is a matrix of zeros.
    In evaluation mode the chunks are taken one after the other without their gradients; asked for
    them all the same, it keeps the logits. First derivatives only, and not within `mx.compile`.

    Args:
        model: its `head` takes (N, D) to (N, V).
        hidden_states: (N, D) at the supervised positions.
        targets: (N,) token ids.

    Returns:
        A float32 scalar.
    """
    if not len(targets):
        return hidden_states.astype(mx.float32).sum()  # of nothing
    parameters = _head_parameters(model)

    def chunk_loss(part: mx.array, given: dict, wanted: mx.array) -> mx.array:
        model.update(given)
        try:
            return _cross_entropy_sum(model.head(part), wanted)
        finally:
            model.update(parameters)

    if not model.training:
        return _in_chunks(model, hidden_states, targets)
    return _with_gradients(model, chunk_loss, targets)(hidden_states, parameters)[0]


def _with_gradients(model: nn.Module, chunk_loss: ChunkLoss, targets: mx.array) -> Callable:
    """(hidden_states, parameters) → loss, and its gradients by both as further outputs."""

    @mx.custom_function
    def loss_and_gradients(hidden_states: mx.array, parameters: dict) -> tuple:
        total, slopes, sums = mx.array(0.0), [], None
        for part, wanted in _chunks(model, hidden_states, targets):
            if slopes:
                part = _after(part, total, slopes[-1], sums)
            loss, (slope, new) = mx.value_and_grad(chunk_loss, (0, 1))(part, parameters, wanted)
            sums = new if sums is None else tree_map(mx.add, sums, new)
            total, slopes = total + loss, [*slopes, slope]
        return total, mx.concatenate(slopes), sums

    @loss_and_gradients.vjp
    def backward(primals: tuple, flows: tuple, outputs: tuple) -> tuple:
        if flows[0].item() == 1:  # the sum itself is differentiated: a head's gradient is large
            return outputs[1], outputs[2]
        return tree_map(lambda x: (flows[0] * x).astype(x.dtype), (outputs[1], outputs[2]))

    return loss_and_gradients


def _in_chunks(model: nn.Module, hidden_states: mx.array, targets: mx.array) -> mx.array:
    total = mx.array(0.0)
    for part, wanted in _chunks(model, hidden_states, targets):
        logits = model.head(_after(part, total)).astype(mx.float32)
        total = total + _losses(logits, wanted)[0].sum()
    return total


def _chunks(
    model: nn.Module, hidden_states: mx.array, targets: mx.array
) -> list[tuple[mx.array, mx.array]]:
    size = chunk_positions(model.head(hidden_states[:1]).shape[-1])  # no logits are computed here
    starts = range(0, len(targets), size)
    return [(hidden_states[s : s + size], targets[s : s + size]) for s in starts]


def _after(part: mx.array, *results: object) -> mx.array:
    # Nothing else keeps MLX from computing the logits of all chunks before it uses them.
    (part,) = mx.depends([part], [array for _, array in tree_flatten(results)])
    return part


def _head_parameters(model: nn.Module) -> dict:
    """What trains outside the decoder layers."""
    trainable = tree_flatten(model.trainable_parameters())
    try:
        path, _ = find_layers(model)
    except ConfigError:
        return tree_unflatten(trainable)
    return tree_unflatten([pair for pair in trainable if not pair[0].startswith(f"{path}.")])


def _losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Losses (N, 1), exp(logits - their maximum) (N, V), and its row sums (N, 1)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    score = mx.take_along_axis(shifted, targets[:, None], axis=-1)
    weights = exponential(shifted)
    total = weights.sum(axis=-1, keepdims=True)
    return mx.log(total) - score, weights, total


def _cross_entropy_sum(logits: mx.array, targets: mx.array) -> mx.array:
    """Logits (N, V), targets (N,) → scalar; its gradient is softmax - one-hot."""
    return _sum_and_slopes(logits.astype(mx.float32), targets)[0]


@mx.custom_function
def _sum_and_slopes(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The sum, and its gradient (N, V); exponentials are taken once for both."""
    losses, weights, total = _losses(logits, targets)
    slopes = (weights * (1 / total)).at[mx.arange(len(targets)), targets].add(-1.0)
    return losses.sum(), slopes


@_sum_and_slopes.vjp
def _times_flow(primals: tuple, flows: tuple, outputs: tuple) -> tuple:
    return flows[0] * outputs[1], mx.zeros_like(primals[1])
