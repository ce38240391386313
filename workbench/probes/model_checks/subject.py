"""The model under test: called safely, in float32, and left exactly as it was."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from workbench.models.loading import embedding_rows
from workbench.models.report import LoadReport
from workbench.models.structure import module_at
from workbench.probes.recording import recorded

LENGTH = 12  # tokens of a probing row
SAME = {mx.float32: 3e-5, mx.float16: 2e-2, mx.bfloat16: 6e-2}  # relative to the largest logit
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


class CallFailedError(Exception):
    """The model under test raised, or did not return logits."""


@dataclass
class Subject:
    """A causal language model under test, and what is known about it."""

    model: nn.Module
    config: object = None  # an object or mapping with Hugging Face's names, if there is one
    tokenizer: object = None
    report: LoadReport | None = None
    dtypes: Counter = field(default_factory=Counter)  # of the parameters, before the checks

    @functools.cached_property
    def embedding(self) -> str | None:
        """Path of the embedding that reads the tokens themselves (not positions or types)."""
        paths = [p for p, m in self.model.named_modules() if isinstance(m, EMBEDDINGS)]
        tokens = np.array([[2, 0, 1]])
        with recorded(self.model, paths) as heard, contextlib.suppress(CallFailedError):
            self.call(tokens)
        read = [call for call in heard if call.inputs is not None and call.inputs.size == 3]
        return next((c.path for c in read if (np.array(c.inputs) == tokens).all()), None)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Width that the logits should have: the rows of the token embedding."""
        if self.embedding is not None:
            return module_at(self.model, self.embedding).weight.shape[0]
        declared = self.setting("vocab_size")
        known = embedding_rows(self.model, types.SimpleNamespace(vocab_size=declared))
        return known or self.logits(np.zeros((1, 1), np.int32)).shape[-1]

    @functools.cached_property
    def length(self) -> int:
        """Tokens of a probing row: no more than the model has positions for."""
        names = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "context_length")
        tables = [m.weight.shape[0] for p, m in self.model.named_modules() if _is_position(p, m)]
        rooms = [room for room in (self.setting(*names), *tables) if isinstance(room, int)]
        return max(2, min([LENGTH, *rooms]))

    @property
    def tolerance(self) -> float:
        """Differences up to this share of the largest logit are rounding."""
        floating = [a.dtype for _, a in tree_flatten(self.model.parameters()) if _floats(a)]
        return max((SAME.get(dtype, 0.0) for dtype in floating), default=SAME[mx.float32])

    @property
    def window(self) -> int | None:
        """Positions that its attention or its rotating cache sees; None if unlimited."""
        names = ("sliding_window", "attention_window_size", "sliding_window_size", "window_size")
        sizes = [self.setting(*names)]
        sizes += [getattr(part, "max_size", None) for part in self.make_cache() or ()]
        return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)

    def setting(self, *names: str) -> object:
        """The first of these settings that the model's configuration has; None if none."""
        places = (self.config, getattr(self.model, "config", None), getattr(self.model, "args", 0))
        for place in places:
            for name in names:
                found = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
                if found is not None:
                    return found
        return None

    def accepts(self, name: str) -> bool:
        """Whether the model's call has a parameter of that name."""
        try:
            return name in inspect.signature(type(self.model).__call__).parameters
        except (TypeError, ValueError):
            return False

    def tokens(self, rows: int = 1, length: int | None = None, seed: int = 0) -> np.ndarray:
        """Random ids (rows, length), no two alike if the vocabulary allows it."""
        length = length or self.length
        random, count = np.random.default_rng(seed), rows * length
        replace = count > self.vocab_size
        return random.choice(self.vocab_size, count, replace=replace).reshape(rows, length)

    def another(self, token: int) -> int:
        """A token id that differs from `token`."""
        return (int(token) + self.vocab_size // 2 + 1) % self.vocab_size

    def call(self, tokens: np.ndarray, **kwargs) -> object:
        """What the model returns for tokens (B, T), evaluated.

        Raises:
            CallFailedError: the model raised, now or when its result was evaluated.
        """
        try:
            output = self.model(mx.array(tokens, dtype=mx.int32), **kwargs)
            mx.eval([array for _, array in tree_flatten(output) if isinstance(array, mx.array)])
        except Exception as error:
            kind, text = type(error).__name__, " ".join(str(error).split())
            raise CallFailedError(f"the model raised {kind}: {text[:300]}") from error
        return output

    def logits(self, tokens: np.ndarray, **kwargs) -> np.ndarray:
        """Logits (B, T, V) as float32; of a tuple, the first item.

        Raises:
            CallFailedError: the model raised, or returned something else.
        """
        output = self.call(tokens, **kwargs)
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if not isinstance(output, mx.array):
            raise CallFailedError(f"the model returned {type(output).__name__}, not an array")
        if output.ndim != 3 or output.shape[:2] != tokens.shape:
            wanted = f"(B, T, V) = {(*tokens.shape, self.vocab_size)}"
            raise CallFailedError(f"the model returned shape {output.shape}, expected {wanted}")
        return np.array(output.astype(mx.float32))

    def make_cache(self) -> list | None:
        """A fresh KV cache; None if the model's call takes none, or none can be made."""
        if not self.accepts("cache"):
            return None
        own = getattr(self.model, "make_cache", None)
        if callable(own):
            return own()
        if isinstance(getattr(self.model, "layers", None), list):
            from mlx_lm.models.cache import KVCache

            return [KVCache() for _ in self.model.layers]
        return None


def difference(one: np.ndarray, other: np.ndarray, scale: float | None = None) -> float:
    """Largest absolute difference, as a share of the largest absolute value in `other`."""
    scale = scale or float(np.abs(other).max(initial=0.0))
    return float(np.abs(one - other).max(initial=0.0)) / (scale or 1.0)


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[Counter]:
    """Dropout off, and floating-point parameters as float32 unless the model is quantised.

    Yields the parameters' own dtypes, counted. The very arrays and modes come back afterwards.
    """
    original = model.parameters()
    modes = [(module, vars(module).get("_training")) for module in model.modules()]
    quantised = any(isinstance(module, QUANTISED) for module in model.modules())
    dtypes = Counter(_name(array) for _, array in tree_flatten(original))
    try:
        model.eval()
        if not quantised:
            model.update(tree_map(lambda a: a.astype(mx.float32) if _floats(a) else a, original))
        yield dtypes
    finally:
        model.update(original)
        for module, training in modes:
            if training is None:  # made without nn.Module's own __init__
                vars(module).pop("_training", None)
            else:
                module._training = training


def zero_matrices(model: nn.Module) -> list[str]:
    """Names of the floating-point matrices that hold nothing but zeros; an adapter's are left out.

    Networks often start so where a layer leads back into the residual stream (nanochat's c_proj):
    nothing that stands before such a matrix can be seen from outside.
    """
    named = [(n, a) for n, a in tree_flatten(model.parameters()) if a.ndim > 1 and _floats(a)]
    return [n for n, a in named if not n.endswith("lora_b") and not a.any().item()]


@contextlib.contextmanager
def awakened(model: nn.Module, names: list[str]) -> Iterator[None]:
    """These matrices hold random numbers for the length of a `with` block."""
    held, root = dict(tree_flatten(model.parameters())), mx.random.key(0)
    zeros = [(name, held[name]) for name in names]
    keys = mx.random.split(root, len(zeros)) if zeros else ()
    random = [
        (name, (mx.random.normal(a.shape, key=key) * a.shape[-1] ** -0.5).astype(a.dtype))
        for (name, a), key in zip(zeros, keys)
    ]
    model.update(tree_unflatten(random))
    try:
        yield
    finally:
        model.update(tree_unflatten(zeros))


def _is_position(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return isinstance(module, EMBEDDINGS) and ("pos" in name or name == "wpe")


def _floats(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
