"""Hidden states that leave the frozen layers, kept by row, and a loss that begins with them.

Rows are computed in groups that the data alone decides, and where there is no room for all of
them, each by itself. So it does not matter which batch came first, nor where a run was resumed.

The BLAS may add up a product of another height in another order: the tests hold the loss within
1e-6 of the plain path's, and each gradient within 1e-5 of its largest element. States are held in
memory only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from workbench.data.batches import Batch
from workbench.data.examples import Example
from workbench.models.partial_runs import begun_at, entering, paths_above
from workbench.models.shared_prompt import find_shared_prompt
from workbench.models.structure import find_layers
from workbench.models.trying import probe_tokens
from workbench.probes.parameters import WatchedWeights
from workbench.tuning.losses import LossFunction, next_token_pairs

GROUP_POSITIONS = 1024  # of rows that are computed together
RAW = {2: mx.uint16, 4: mx.uint32}  # by bytes: NumPy has no bfloat16


class PrefixCache:
    """Hidden states that enter a layer, by the tokens of the row; held outside MLX's memory.

    What is held belongs to `key`: the hash of the weights below the layer, the layer's number and
    the dtype. When other weights are put into the network, the key changes and nothing held is
    used again. Writing into a weight's elements in place is not noticed.

    Args:
        model: a network that can begin at `first_layer`, with nothing that trains below it.
        first_layer: the layer that the states enter, from 1.
        limit_bytes: that may be held; rows beyond are computed whenever they are asked for.
        examples: whose states fit into the limit; rows of like length are computed together.
    """

    def __init__(
        self,
        model: nn.Module,
        first_layer: int,
        limit_bytes: int,
        examples: Iterable[Example] = (),
    ):
        self.model, self.first_layer, self.limit_bytes = model, first_layer, limit_bytes
        self.dtype, self._above = outline(model, first_layer).dtype, paths_above(model)
        self._shares = getattr(model, "can_share_prompts", False)
        self.held_bytes = self.hits = self.misses = 0
        self._states: dict[bytes, np.ndarray] = {}
        self._group_of = {_content(row): group for group in _groups(examples) for row in group}
        self._watched = WatchedWeights(self._weights(), first_layer, str(self.dtype))

    def states(self, batch: Batch) -> mx.array:
        """Hidden states (B, T - 1, D) that enter `first_layer` for a batch's inputs.

        Behind the last token that a target is predicted from, a row's last state is repeated:
        nothing that counts sees it, and no norm divides by zero there.
        """
        if self._watched.replaced(self._weights()):
            self._states, self.held_bytes = {}, 0
        length = batch.tokens.shape[1] - 1
        rows = [self._state(seen) for seen in _seen_tokens(batch.tokens, batch.loss_mask)]
        padded = [np.pad(row, ((0, length - len(row)), (0, 0)), mode="edge") for row in rows]
        return mx.array(np.stack(padded)).view(self.dtype)

    @property
    def key(self) -> str:
        """Hash of the weights below the layer, its number and the dtype."""
        return self._watched.key

    def _state(self, seen: np.ndarray) -> np.ndarray:
        content = _content(seen)
        if content in self._states:
            self.hits += 1
            return self._states[content]
        group = self._group_of.get(content, [seen])
        self.misses += len(group)
        computed = dict(zip(map(_content, group), self._computed(group)))
        size = sum(state.nbytes for state in computed.values())
        if self.held_bytes + size <= self.limit_bytes:
            self._states |= computed
            self.held_bytes += size
        return computed[content]

    def _computed(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        """What enters the layer for each row: (T, D), by the raw bits."""
        longest = max(map(len, rows))
        tokens = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])
        shared = find_shared_prompt(tokens) if self._shares else None
        if shared is None:
            states = entering(self.model, self.first_layer, tokens)
        else:
            states = shared.pack(self.model.embed(mx.array(tokens)))
            states = self.model.run_layers(states, end=self.first_layer, shared=shared)
            states = shared.unpack(states)
        raw = np.array(states.view(RAW[self.dtype.size]))
        return [state[: len(row)].copy() for state, row in zip(raw, rows)]

    def _weights(self) -> list[tuple[str, mx.array]]:
        named = tree_flatten(self.model.parameters())
        return below(self.model, self.first_layer, self._above, named)


@dataclass(frozen=True)
class PrefixLoss:
    """A loss function whose model begins with the cached states; other models run whole."""

    cache: PrefixCache
    loss_fn: LossFunction

    def __call__(self, model: nn.Module, batch: Batch) -> mx.array:
        """Sum of the loss over the batch's supervised targets."""
        if model is not self.cache.model:
            return self.loss_fn(model, batch)
        states, first = self.cache.states(batch), self.cache.first_layer
        with begun_at(model, first, states) as begun:
            return self.loss_fn(begun, batch)


def below(
    model: nn.Module, first: int, above: tuple[str, ...], named: Iterable[tuple[str, object]]
) -> list[tuple[str, object]]:
    """Those pairs of (name, module or array) that come before a layer.

    `above` are paths of modules that come after the layers, as `paths_above` finds them.
    """
    inside, after = f"{find_layers(model)[0]}.", tuple(f"{path}." for path in above)

    def runs_before(name: str) -> bool:
        if name.startswith(inside):
            return int(name.removeprefix(inside).partition(".")[0]) < first
        return not f"{name}.".startswith(after)

    return [(name, leaf) for name, leaf in named if runs_before(name)]


def outline(model: nn.Module, first: int) -> mx.array:
    """Hidden states that enter a layer; their width and dtype need no evaluation."""
    return entering(model, first, probe_tokens(model))


def _seen_tokens(tokens: np.ndarray, loss_mask: np.ndarray) -> Iterator[np.ndarray]:
    """Of each row, the inputs up to the last that a target is predicted from; one at least."""
    inputs, _, wanted = next_token_pairs(tokens, loss_mask)
    for row, targets in zip(inputs, wanted):
        places = np.flatnonzero(targets)
        yield row[: places[-1] + 1 if len(places) else 1]


def distinct_rows(examples: Iterable[Example]) -> list[np.ndarray]:
    """The rows that are computed; rows that begin alike are one."""
    seen = {
        _content(row): row
        for example in examples
        for row in _seen_tokens(example.tokens[None], example.loss_mask[None])
    }
    return list(seen.values())


def _content(row: np.ndarray) -> bytes:
    return row.astype(np.int32).tobytes()


def _groups(examples: Iterable[Example]) -> list[list[np.ndarray]]:
    """Rows that are computed together: those of like length, whatever their order in the data."""
    groups: list[list[np.ndarray]] = []
    for row in sorted(distinct_rows(examples), key=lambda row: (len(row), _content(row))):
        if not groups or (len(groups[-1]) + 1) * len(row) > GROUP_POSITIONS:
            groups.append([])
        groups[-1].append(row)
    return groups
