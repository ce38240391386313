"""Who trains: exactly what the mode names."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from workbench.errors import ConfigError
from workbench.models.structure import find_layers
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.training_checks.subject import Training, shown

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def adapters(parameters: dict[str, mx.array]) -> list[str]:
    """Paths of the modules that hold lora_a or lora_b."""
    ends = ("lora_a", "lora_b")
    return sorted({n.rpartition(".")[0] for n in parameters if n.rpartition(".")[2] in ends})


def expected_names(model: nn.Module, mode: str) -> set[str]:
    """Names of the parameters that should train in a mode.

    Raises:
        ConfigError: of the mode "head", if the layers cannot be found.
    """
    parameters = dict(tree_flatten(model.parameters()))
    if mode == "frozen":
        return set()
    if mode == "lora":
        places = set(adapters(parameters))
        parts = {n: n.rpartition(".") for n in parameters}
        own = ("lora_a", "lora_b", "m")  # m: DoRA's magnitude
        return {n for n, (place, _, name) in parts.items() if place in places and name in own}
    modules = dict(model.named_modules())
    packed = tuple(f"{path}." for path, m in modules.items() if isinstance(m, QUANTISED))
    names = {
        name
        for name, array in parameters.items()
        if mx.issubdtype(array.dtype, mx.floating) and not name.startswith(packed)
    }
    if mode == "full":
        return names
    layers, _ = find_layers(model)
    embeddings = tuple(f"{path}." for path, m in modules.items() if isinstance(m, EMBEDDINGS))
    return {name for name in names if not name.startswith((f"{layers}.", *embeddings))}


def check_trainable(training: Training) -> Finding:
    """Heading "trainable set": exactly what the mode names trains; something does."""
    parameters = dict(tree_flatten(training.model.parameters()))
    trainable, mode, has_adapter = training.trainable, training.mode, bool(adapters(parameters))
    numbers = sum(array.size for array in trainable.values())
    detail = f"{len(trainable)} of {len(parameters)} tensors train, {numbers:,} numbers"
    if mode != "frozen" and not trainable:
        late = "the adapter was attached before model.freeze(): freeze first, then attach"
        cause = late if has_adapter else "attach an adapter, or unfreeze what should train"
        return failed("trainable set", f"nothing trains: all {len(parameters)} are frozen", cause)
    if mode is None:
        return passed("trainable set", f"{detail}: {shown(_kinds(trainable))}")
    if mode == "lora" and not has_adapter:
        return failed("trainable set", f"{detail}; no lora_a or lora_b", "attach an adapter first")
    try:
        expected = expected_names(training.model, mode)
    except ConfigError as error:
        return not_applicable("trainable set", f"{detail}; mode {mode!r}: {error}")
    surplus, lacking = sorted(trainable.keys() - expected), sorted(expected - trainable.keys())
    if surplus:
        causes = {"lora": "a bare model.unfreeze(), or the base was never frozen"}
        cause = causes.get(mode, "freeze the model, then unfreeze what the mode names")
        wrong = f"{len(surplus)} train that mode {mode!r} does not name: {shown(surplus)}"
        return failed("trainable set", f"{detail}; {wrong}", cause)
    if lacking:
        wrong = f"{len(lacking)} of mode {mode!r} are frozen: {shown(lacking)}"
        return failed("trainable set", f"{detail}; {wrong}", "unfreeze them after model.freeze()")
    return passed("trainable set", f"{detail}, exactly those of mode {mode!r}")


def _kinds(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
