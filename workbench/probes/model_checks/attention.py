"""Finding a network's attention modules, and calling one again with other inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.models.structure import module_at
from workbench.probes.model_checks.subject import CallFailedError, Subject
from workbench.probes.recording import Call, intercepted, recorded

VALUES = ("v_proj", "wv", "value", "c_v", "v_lin")
KEYS = ("k_proj", "wk", "key", "c_k", "k_lin")
QUERIES = ("q_proj", "wq", "query", "c_q", "q_lin")
OUTPUTS = ("o_proj", "out_proj", "wo", "dense", "c_proj", "out_lin")


@dataclass
class AttentionCall:
    """One attention module and the call that the network made of it, without a cache."""

    path: str
    module: nn.Module
    call: Call

    def again(self, inputs: mx.array) -> np.ndarray:
        """Its output (B, T, D) for other inputs (B, T, D), everything else as it was.

        Raises:
            CallFailedError: the module raised.
        """
        args, kwargs = self.call.with_inputs(inputs)
        try:
            output = self.module(*args, **kwargs)
            output = output[0] if isinstance(output, tuple | list) else output
            return np.array(output.astype(mx.float32))
        except Exception as error:
            raise CallFailedError(f"{self.path} raised {type(error).__name__}: {error}") from error

    def part(self, names: tuple[str, ...]) -> str | None:
        """Path of its first child of one of these names."""
        return next((f"{self.path}.{name}" for name in names if name in self.module), None)


def attention_calls(subject: Subject) -> list[AttentionCall]:
    """The calls of all attention modules in one forward pass over one row of tokens."""
    model = subject.model
    paths = [path for path, module in model.named_modules() if _is_attention(path, module)]
    outermost = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    with recorded(model, outermost) as heard:
        subject.call(subject.tokens())
    usable = [call for call in heard if call.inputs is not None and call.inputs.ndim == 3]
    ordered = {call.path: call for call in reversed(usable)}
    calls = [AttentionCall(p, module_at(model, p), c) for p, c in ordered.items()]
    return sorted(calls, key=lambda found: _in_order(found.path))


def heads_moved_by(
    subject: Subject, attention: AttentionCall, projection: str, feature: slice, head_dim: int
) -> np.ndarray:
    """Which query heads' results move when some features of a projection change their sign.

    The sign alone: a norm over all of the features (OLMo 2) then gives the others as before.

    Args:
        attention: the module; it needs an output projection.
        projection: path of its key or value projection.
        feature: features of that projection's output.
        head_dim: features of a head.

    Returns:
        (H,) the largest change of each head in the input of the output projection.
    """
    output = attention.part(OUTPUTS)

    def disturbed(module, x, *args, **kwargs):
        signs = mx.ones(module(x, *args, **kwargs).shape[-1])
        signs[feature] = -1.0
        return module(x, *args, **kwargs) * signs

    inputs = attention.call.inputs

    def heads() -> np.ndarray:
        with recorded(subject.model, [output]) as heard:
            attention.again(inputs)
        return np.array(heard[0].inputs.astype(mx.float32))  # (B, T, H · head_dim)

    before = heads()
    with intercepted(subject.model, {projection: disturbed}):
        after = heads()
    moved = np.abs(after - before).max(axis=(0, 1))
    return moved.reshape(-1, head_dim).max(axis=-1)


def _is_attention(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    named = re.search(r"att|mha", name) and "norm" not in name
    return bool(named) and len(module.children()) >= 2


def _in_order(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]
