"""A part of a network's layers: what enters a layer, and a call that begins there.

For any network that calls its layers one after another, each once, where a layer gives one array
(B, T, D). Stand-ins take the places of the layers that do not run. Whether it does is told by its
calls, and tried on a few tokens before it is relied on.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.errors import ConfigError
from workbench.models.stand_ins import intercepted
from workbench.models.structure import find_layers
from workbench.models.trying import described, difference, first_array, probe_tokens, undisturbed

SHORT = 4  # tokens of the second row that is tried: less than the first has


class _Arrived(Exception):  # noqa: N818 - nothing went wrong
    """Ends a call of the network: what was wanted of it is there."""


def entering(model: nn.Module, first: int, tokens: np.ndarray) -> mx.array:
    """Hidden states (B, T, D) that enter layer `first`, from 1, for tokens (B, T).

    With `first` the number of layers, what leaves the last one.

    Raises:
        ConfigError: the layer below gives something else than one array of that shape.
    """
    if has_parts(model):
        return model.run_layers(model.embed(mx.array(tokens)), end=first)
    path, found = f"{find_layers(model)[0]}.{first - 1}", []

    def arriving(layer: nn.Module, *args, **kwargs) -> None:
        found.append(layer(*args, **kwargs))
        raise _Arrived

    with contextlib.suppress(_Arrived), intercepted(model, {path: arriving}):
        model(mx.array(tokens))
    states = found[0]
    if not isinstance(states, mx.array):
        raise ConfigError(f"layer {first - 1} gives a {type(states).__name__}, not one array")
    if states.ndim != 3 or states.shape[:2] != tokens.shape:
        raise ConfigError(f"layer {first - 1} gives {states.shape} for tokens {tokens.shape}")
    return states


@contextlib.contextmanager
def begun_at(model: nn.Module, first: int, states: mx.array) -> Iterator[nn.Module]:
    """The network, to be called as ever, with these states (B, T, D) entering layer `first`.

    The layers below do not run; nor does the embedding, where nothing else asks for it.
    """
    if has_parts(model):
        shortened = copy.copy(model)  # the same modules, by the same names
        shortened.embed = lambda tokens: states
        shortened.run_layers = functools.partial(model.run_layers, first=first)
        yield shortened
        return

    def skipped(layer: nn.Module, *args, **kwargs) -> mx.array:
        return states

    path, _ = find_layers(model)
    with intercepted(model, {f"{path}.{number}": skipped for number in range(first)}):
        yield model


def has_parts(model: nn.Module) -> bool:
    """Whether the network itself can run a part of its layers, as ours can."""
    return all(callable(getattr(model, name, None)) for name in ("embed", "run_layers"))


def paths_above(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules outside the layers that are called after the layers only.

    Raises:
        ConfigError: the layers are not found, or not called one after another, each once.
    """
    path, count = find_layers(model)
    outside = [
        name
        for name, _ in model.named_modules()
        if name and not f"{name}.".startswith(f"{path}.") and not path.startswith(f"{name}.")
    ]
    layers, heard = [f"{path}.{number}" for number in range(count)], []

    def listen(name: str) -> Callable:
        def call(module: nn.Module, *args, **kwargs) -> object:
            heard.append(name)
            return module(*args, **kwargs)

        return call

    try:
        with undisturbed(model), intercepted(model, {n: listen(n) for n in [*layers, *outside]}):
            model(mx.array(probe_tokens(model)))
    except Exception as error:  # whatever a network makes of being listened to
        raise ConfigError(f"the network cannot be tried ({described(error)})") from error
    if [name for name in heard if name in layers] != layers:
        raise ConfigError("its layers are not called one after another, each once")
    end = heard.index(layers[-1])
    return tuple(dict.fromkeys(name for name in heard[end + 1 :] if name not in heard[:end]))


def try_beginning_at(model: nn.Module, first: int) -> None:
    """Hold a call that begins at a layer against the whole, on rows of two lengths.

    Raises:
        ConfigError: the logits differ by more than rounding, or the network cannot do it.
    """
    tokens = probe_tokens(model)
    with undisturbed(model):
        try:
            whole = first_array(model(mx.array(tokens)))
            short = entering(model, first, tokens[1:, :SHORT])
            missing = mx.repeat(short[:, -1:], tokens.shape[1] - SHORT, axis=1)
            row = mx.concatenate([short, missing], axis=1)
            states = mx.concatenate([entering(model, first, tokens[:1]), row])
            with begun_at(model, first, states) as begun:
                found = first_array(begun(mx.array(tokens)))
            found, whole = (mx.concatenate([x[0], x[1, :SHORT]]) for x in (found, whole))
            differs = difference(model, found, whole)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"it cannot begin at layer {first} ({described(error)})") from error
    if differs:
        raise ConfigError(f"begun at layer {first}, it gives {differs}")
