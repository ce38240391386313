"""The module that makes the logits, in any network: told by its calls, tried before it is used.

For a causal language model's loss, logits are wanted at the supervised positions alone. A stand-in
in the head's place picks those out of the hidden states before they are projected; what a network
does to its logits afterwards (a cap, a scale, a cut) treats positions one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from workbench.errors import ConfigError
from workbench.models.stand_ins import LinearStandIn, StandIn, intercepted
from workbench.models.structure import find_layers
from workbench.models.trying import described, difference, first_array, probe_tokens, undisturbed

PLACES = np.array([1, 3, 4, 8, 11])  # of the positions that are tried, in both rows


@dataclass(frozen=True)
class Head:
    """Where a network makes its logits."""

    path: str
    tied: bool  # an embedding, used through `as_linear`

    def run(self, module: nn.Module, hidden_states: mx.array) -> mx.array:
        """hidden_states (..., D) → (..., V)."""
        return module.as_linear(hidden_states) if self.tied else module(hidden_states)

    @property
    def stand_in(self) -> type[StandIn]:
        """What can stand in its place."""
        return LinearStandIn if self.tied else StandIn


def find_head(model: nn.Module) -> Head:
    """The head whose logits at some positions alone are those of all positions.

    The outermost module with a matrix and without layers that takes hidden states (B, T, D) to
    the width of the logits. A few tokens are tried in evaluation mode; nothing changes.

    Raises:
        ConfigError: there is no such module, or its logits depend on where they stand; says which.
    """
    with undisturbed(model):
        tokens = probe_tokens(model)
        try:
            logits, heads = _called(model, tokens)
        except Exception as error:  # whatever a network makes of being listened to
            raise ConfigError(f"the network cannot be tried ({described(error)})") from error
        if not heads:
            raise ConfigError("no module outside the layers makes the logits")
        wanted = logits.reshape(-1, logits.shape[-1])[mx.array(PLACES)]
        reasons = []
        for head in heads:
            reason = _tried(model, head, tokens, wanted)
            if not reason:
                return head
            reasons.append(f"{head.path} gives {reason} at some positions alone")
    raise ConfigError(reasons[0])


def logits_at(model: nn.Module, head: Head, tokens: np.ndarray, places: np.ndarray) -> mx.array:
    """The network's logits at some positions, which alone its head projects.

    Args:
        model: the network that `head` was found in.
        head: from `find_head`.
        tokens: (B, T) ids.
        places: (N,) whole numbers in [0, B · T), one at least.

    Returns:
        Logits (N, V).
    """
    rows = mx.array(places)

    def gathering(module: nn.Module, hidden_states: mx.array) -> mx.array:
        assert hidden_states.shape[:2] == tokens.shape, "the head gets every position once"
        return head.run(module, hidden_states.flatten(0, 1)[rows][None])  # (1, N, V)

    with intercepted(model, {head.path: gathering}, head.stand_in):
        return first_array(model(mx.array(tokens)))[0]


def _tried(model: nn.Module, head: Head, tokens: np.ndarray, wanted: mx.array) -> str:
    try:
        return difference(model, logits_at(model, head, tokens, PLACES), wanted)
    except Exception as error:
        return f"no logits ({described(error)})"


def _called(model: nn.Module, tokens: np.ndarray) -> tuple[mx.array, list[Head]]:
    """The logits (B, T, V), and the modules that could be their head, the likeliest first."""
    heard: dict[Head, int] = {}  # head → width

    def listen(head: Head):
        def call(module: nn.Module, *args, **kwargs) -> object:
            run = module.as_linear if head.tied else module
            output = run(*args, **kwargs)
            if _by_position(args[:1], tokens) and _by_position([output], tokens):
                heard.pop(head, None)
                heard[head] = output.shape[-1]
            return output

        return call

    plain, tied = _outside_layers(model)
    with (
        intercepted(model, {head.path: listen(head) for head in tied}, LinearStandIn),
        intercepted(model, {head.path: listen(head) for head in plain}),
    ):
        logits = first_array(model(mx.array(tokens)))
    if not _by_position([logits], tokens):
        raise ValueError(f"it returned {getattr(logits, 'shape', None)}, not logits (B, T, V)")
    # A module returns after those in it, and the head after all that come before it.
    return logits, [head for head in reversed(heard) if heard[head] >= logits.shape[-1]]


def _by_position(values: list | tuple, tokens: np.ndarray) -> bool:
    """Whether each is a floating-point array (B, T, …) of the tokens' positions."""
    return bool(values) and all(
        isinstance(value, mx.array)
        and value.ndim == 3
        and value.shape[:2] == tokens.shape
        and mx.issubdtype(value.dtype, mx.floating)
        for value in values
    )


def _outside_layers(model: nn.Module) -> tuple[list[Head], list[Head]]:
    """Modules with a matrix that hold no layers and are in none; the embeddings among them."""
    try:
        layers = f"{find_layers(model)[0]}."
    except ConfigError:
        layers = "."
    named = [
        (path, module)
        for path, module in model.named_modules()
        if path and not f"{path}.".startswith(layers) and not layers.startswith(f"{path}.")
        if any(array.ndim > 1 for _, array in tree_flatten(module.parameters()))
    ]
    plain = [Head(path, False) for path, _ in named]
    return plain, [Head(path, True) for path, m in named if callable(getattr(m, "as_linear", None))]
