"""Prompts on their way through a network with a KV cache, and what is kept of one for the next."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from itertools import takewhile

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.models.decoder import Decoder

# Prompt tokens that go through the network at once. Attention computes the scores of a whole chunk
# against all keys up to its end, so a longer one spends more on scores that the mask hides.
PREFILL_CHUNK = 128
DROP_SHARE = 0.25  # of the rows that are decoded; dropping copies the others' keys and values


class KeptPrompt:
    """The KV cache of one prompt and its answer: another prompt that begins alike goes on from it.

    So a conversation computes each message once. Replaced weights begin anew; whether an adapter
    is switched on is not noticed: keep one for each.
    """

    def __init__(self):
        self.tokens: list[int] = []  # that the cache holds
        self._cache: list = []
        self._weights: list[weakref.ref] = []  # that it was computed with

    def cache_for(self, model: nn.Module, ids: Sequence[int], capacity: int) -> list:
        """A cache that holds the prompt's first `tokens`, as many as are known, and never all."""
        pairs = zip(self.tokens, ids[:-1])
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        surplus = len(self.tokens) - known
        if not self._holds(model) or (surplus and not self._can_forget()):
            known, self._cache = 0, fresh_cache(model, capacity)
        elif surplus:
            for layer_cache in self._cache:
                layer_cache.trim(surplus)
        self.tokens = self.tokens[:known]
        self._weights = [weakref.ref(array) for _, array in tree_flatten(model.parameters())]
        return self._cache

    @contextlib.contextmanager
    def taking_in(self, tokens: mx.array) -> Iterator[None]:
        """Around the computation of tokens (1, T); one that fails leaves nothing to go on from."""
        held, self._weights = self._weights, []
        yield
        self.tokens += tokens[0].tolist()
        self._weights = held

    def _holds(self, model: nn.Module) -> bool:
        arrays = [array for _, array in tree_flatten(model.parameters())]
        return len(arrays) == len(self._weights) and all(
            noted() is array for noted, array in zip(self._weights, arrays)
        )

    def _can_forget(self) -> bool:
        """Whether the cache can lose its last tokens: a window, or a state, cannot."""
        return all(layer_cache.is_trimmable() for layer_cache in self._cache)


def fresh_cache(model: nn.Module, capacity: int) -> list:
    """A KV cache for each layer, or what the architecture has in its place."""
    if isinstance(model, Decoder):
        return model.make_cache(capacity)
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


class BatchDecoder:
    """A batch of prompts on its way through a network with a KV cache.

    Rows that have ended are dropped from the batch once they are DROP_SHARE of it; other
    architectures than ours keep them to the end, and their tokens are ignored.

    Args:
        model: the network.
        prompts: token ids.
        capacity: positions that prompts and answers need.
        kept: of an earlier prompt, where this is one alone; takes in what is computed here.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        kept: KeptPrompt | None = None,
    ):
        longest = max(len(ids) for ids in prompts)
        missing = [longest - len(ids) for ids in prompts]
        self.model, self.padding = model, mx.array(missing) if any(missing) else None
        self.tokens = mx.array([[0] * gap + list(ids) for gap, ids in zip(missing, prompts)])
        self.rows = list(range(len(prompts)))  # prompts that are still in the batch
        self._kept = kept
        if kept is None:
            self.cache = fresh_cache(model, capacity)
        else:
            self.cache = kept.cache_for(model, prompts[0], capacity)
            self.tokens = self.tokens[:, len(kept.tokens) :]

    def prefill(self) -> mx.array:
        """Logits (B, V) after the prompts, which go through the network in chunks."""
        for start in range(0, self.tokens.shape[1], PREFILL_CHUNK):
            logits = self._forward(self.tokens[:, start : start + PREFILL_CHUNK])
            # Of all chunks but the last only the keys and values are needed, and computed.
            mx.eval([layer_cache.state for layer_cache in self.cache])
        return logits

    def next(self, tokens: mx.array, running: set[int]) -> mx.array:
        """Logits (rows, V) after one more token (rows,) each.

        Args:
            tokens: one for each of `rows`, as they are before the call.
            running: prompts that have not ended; the others may be dropped from `rows`.
        """
        num_ended = len(self.rows) - len(running)
        if num_ended >= DROP_SHARE * len(self.rows) and isinstance(self.model, Decoder):
            kept = [place for place, row in enumerate(self.rows) if row in running]
            tokens = tokens[mx.array(kept)]
            self._keep(kept)
        return self._forward(tokens[:, None])

    def _keep(self, places: list[int]) -> None:
        self.rows = [self.rows[place] for place in places]
        index = mx.array(places)
        for layer_cache in self.cache:
            layer_cache.keep_rows(index)
        if self.padding is not None:
            self.padding = self.padding[index]

    def _forward(self, tokens: mx.array) -> mx.array:
        with self._kept.taking_in(tokens) if self._kept else contextlib.nullcontext():
            if isinstance(self.model, Decoder):
                hidden_states = self.model.backbone(tokens, self.cache, self.padding)
                return self.model.head(hidden_states[:, -1])
            return self.model(tokens, cache=self.cache)[:, -1]
