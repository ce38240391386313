"""Finding a network's attention modules, and calling one again with other inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workbench.models.structure import module_at
from workbench.probes.model_checks.subject import CallFailedError, Subject
from workbench.probes.recording import Call, recorded

QUERIES = ("q_proj", "wq", "query", "c_q", "attn_query", "query_proj")
KEYS = ("k_proj", "wk", "key", "c_k", "attn_key", "key_proj")
VALUES = ("v_proj", "wv", "value", "c_v", "attn_value", "value_proj")
OUTPUTS = ("o_proj", "out_proj", "wo", "dense", "c_proj", "attn_resid")


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
    tokens = subject.tokens()  # before the recording: it may call the model, too
    with recorded(model, outermost) as heard:
        subject.call(tokens)
    usable = [call for call in heard if call.inputs is not None and call.inputs.ndim == 3]
    ordered = {call.path: call for call in reversed(usable)}
    calls = [AttentionCall(p, module_at(model, p), c) for p, c in ordered.items()]
    return sorted(calls, key=lambda found: _in_order(found.path))


def _is_attention(path: str, module: nn.Module) -> bool:
    name, children = path.rpartition(".")[2], module.children()
    named = re.search(r"att|mha", name) and "norm" not in name and len(children) >= 2
    projects = all(children.keys() & {*names} for names in (QUERIES, VALUES))
    return bool(named or projects)


def _in_order(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]
