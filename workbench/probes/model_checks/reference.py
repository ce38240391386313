"""Against a reference: where do two networks part?"""

from __future__ import annotations

import os
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd

from workbench.errors import ConfigError
from workbench.models.files import read_safetensors
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.subject import Subject, prepared
from workbench.probes.recording import Call, recorded

COLUMNS = ["place", "input difference", "difference", "scale"]


def layer_differences(model: nn.Module, reference: nn.Module, tokens: np.ndarray) -> pd.DataFrame:
    """Compare what goes into and comes out of every module that two networks both have.

    Args:
        model: the network under test.
        reference: a network whose modules have the same paths.
        tokens: (B, T) ids.

    Returns:
        One row a module, in the order in which they return: `place`, largest absolute
        `input difference` and `difference` of the output (infinite if the shapes differ), and
        `scale`, the largest absolute value in the reference's output. The last row is `logits`.
    """
    ours, theirs = _calls(model, tokens), _calls(reference, tokens)
    rows = []
    for path, call in ours.items():
        other = theirs.get(path)
        if other is not None and call.result is not None and other.result is not None:
            apart, scale = _apart(call.result, other.result)
            before, _ = _apart(call.inputs, other.inputs)
            rows.append((path, before, apart, scale))
    return pd.DataFrame(rows, columns=COLUMNS)


def _calls(model: nn.Module, tokens: np.ndarray) -> dict[str, Call]:
    with prepared(model), recorded(model) as heard:
        output = model(mx.array(tokens, dtype=mx.int32))
        mx.eval([call.result for call in heard if call.result is not None], output)
    calls = {call.path: call for call in heard}
    return {**calls, "logits": Call("logits", (), {}, output)}


def _apart(one: mx.array | None, other: mx.array | None) -> tuple[float, float]:
    if one is None or other is None:
        return 0.0, 1.0
    if one.shape != other.shape:
        return float("inf"), 1.0
    one, other = (np.array(array.astype(mx.float32)) for array in (one, other))
    return float(np.abs(one - other).max(initial=0)), float(np.abs(other).max(initial=0)) or 1.0


def check_reference(subject: Subject, reference: object) -> Iterator[Finding]:
    """Heading "reference": equal logits; else the first place where the two part.

    Args:
        reference: a network, (tokens, logits) as arrays, or a .safetensors file with both.
    """
    if reference is None:
        yield not_applicable("reference", "none was given: reference=… (a model, or saved logits)")
        return
    tokens, expected = _reference_logits(subject, reference)
    logits = subject.logits(tokens)
    if logits.shape != expected.shape:
        yield failed(
            "reference",
            f"logits {logits.shape}, the reference has {expected.shape}",
            "the two have different vocabularies",
        )
        return
    scale = float(np.abs(expected).max()) or 1.0
    apart = float(np.abs(logits - expected).max()) / scale
    if apart <= max(subject.tolerance, 1e-4):
        yield passed("reference", f"logits of {tokens.size} tokens agree (at most {apart:.1e})")
    elif isinstance(reference, nn.Module):
        yield _first_departure(subject, reference, tokens, apart)
    else:
        yield failed(
            "reference",
            f"logits differ by {apart:.2g} of the largest",
            "give the reference *model* to see the first module that departs",
        )


def _reference_logits(subject: Subject, reference: object) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(reference, nn.Module):
        tokens = subject.tokens(2)
        with prepared(reference):
            return tokens, Subject(reference).logits(tokens)
    if isinstance(reference, str | os.PathLike):
        saved = read_safetensors(reference)
        reference = saved.get("tokens"), saved.get("logits")
    try:
        tokens, logits = (np.array(mx.array(part)) for part in reference)
    except (TypeError, ValueError):
        tokens = logits = np.zeros(0)
    if tokens.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ConfigError(
            f"reference has tokens {tokens.shape} and logits {logits.shape}",
            cure="Give a model, or tokens (B, T) and logits (B, T, V), or a file with both.",
        )
    return tokens, logits.astype(np.float32)


def _first_departure(
    subject: Subject, reference: nn.Module, tokens: np.ndarray, apart: float
) -> Finding:
    table = layer_differences(subject.model, reference, tokens)
    bound = max(subject.tolerance, 1e-4)
    departs = table["difference"] > bound * table["scale"]
    agreeing, first = int(departs.to_numpy().argmax()), table[departs].iloc[0]
    place, through_input = first["place"], first["input difference"] > 0.1 * first["difference"]
    detail = (
        f"logits differ by {apart:.2g} of the largest; {agreeing} modules agree, the first that "
        f"departs is {place}, by {first['difference'] / first['scale']:.2g} of its largest output"
    )
    return failed("reference", detail, _departure_cause(place, through_input))


def _departure_cause(place: str, through_input: bool) -> str:
    parent, _, name = place.rpartition(".")
    if place == "logits":
        return "after the last module: softcap, a scale on the logits, or a tied head mixed up"
    if through_input:
        return _glue_cause(parent.rpartition(".")[2], name)
    if "norm" in name:
        return "its input agrees: epsilon, weight, or the kind of norm"
    if "att" in name:
        return (
            "its projections agree: RoPE (layout, base, axis, offset), the mask, the scale, or the "
            "order of key/value heads"
        )
    if "mlp" in name or "feed" in name or "ffn" in name:
        return "its projections agree: the activation, or gate and up exchanged"
    if "emb" in name or "wte" in name:
        return "the embedding: its weights, or a scale"
    if name.isdigit():
        return "its modules agree: the residual connection, or norm placement"
    return "its input agrees: its weights or its bias differ"


def _glue_cause(parent: str, name: str) -> str:
    """The modules before agree, but what goes into this one does not."""
    if "att" in parent:
        return (
            f"between its projections and {name}: RoPE (layout, base, axis, offset), the mask, the "
            "scale, or the order of key/value heads"
        )
    if any(part in parent for part in ("mlp", "feed", "ffn")):
        return f"between its projections and {name}: the activation, or gate and up exchanged"
    return f"between the modules before it and {name}: a residual, the norm placement, or a scale"
