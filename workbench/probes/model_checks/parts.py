"""Head, softcap, norms, gradients and weights: the parts that a port gets subtly wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from workbench.models.structure import module_at
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.attention import attention_calls
from workbench.probes.model_checks.subject import (
    EMBEDDINGS,
    QUANTISED,
    Subject,
    difference,
)

NAMED = 3  # parameters that a finding lists
FACTORS = (1e-3, 1e4, 1e6)  # on the head's weights: the last two saturate any softcap


def check_head(subject: Subject) -> Iterator[Finding]:
    """Heading "head": whether the head is the embedding (tied), and what the config says."""
    declared = subject.setting("tie_word_embeddings", "tie_embeddings")
    path = subject.embedding
    module = module_at(subject.model, path) if path else None
    if not isinstance(module, nn.Embedding):
        yield not_applicable("head", "no plain token embedding was found")
        return
    tokens = subject.tokens()
    absent = next(t for t in range(subject.vocab_size) if t not in tokens)
    before, weight = subject.logits(tokens), module.weight
    changed = mx.array(weight)
    changed[absent] = changed[absent] + 0.5 * mx.std(weight) + changed[absent]
    with _weights(module, changed):
        moved = difference(subject.logits(tokens), before)
    tied = moved > subject.tolerance
    seen = f"changing row {absent} of {path} {'moves' if tied else 'does not move'} its logit"
    kind = "tied to the embedding" if tied else "a matrix of its own"
    if isinstance(declared, bool) and declared != tied:
        yield failed(
            "head",
            f"{seen}, but tie_word_embeddings is {declared}",
            f"the head is {kind} where the checkpoint has "
            f"{'its own lm_head' if tied else 'one matrix for both'}",
        )
    else:
        yield passed("head", f"{kind}: {seen}")


def check_softcap(subject: Subject) -> Iterator[Finding]:
    """Heading "softcap": logits saturate where the config says, cap · tanh(logits / cap)."""
    declared = subject.setting(
        "final_logit_softcapping", "final_logit_softcap", "logits_soft_cap", "logit_softcap"
    )
    heads = [m for m in subject.model.modules() if _as_wide_as_vocabulary(m, subject.vocab_size)]
    if not heads:
        yield not_applicable("softcap", "no plain head or embedding was found")
        return
    tops = []  # largest logit for each factor
    for factor in FACTORS:
        with contextlib.ExitStack() as stack:
            for head in heads:
                stack.enter_context(_weights(head, head.weight * factor))
            tops.append(float(np.abs(subject.logits(subject.tokens())).max()))
    if not tops[0] < 0.1 * tops[1]:
        yield not_applicable("softcap", "no weights were found that make the logits louder")
        return
    cap = tops[2] if tops[2] <= 1.01 * tops[1] else None
    wanted = float(declared) if isinstance(declared, int | float) and declared else None
    if wanted is None and cap is None:
        yield not_applicable("softcap", "the config names none, and logits do not saturate")
    elif wanted is not None and (cap is None or abs(cap - wanted) > 0.01 * wanted):
        seen = f"saturate at {cap:.4g}" if cap else f"reach {tops[1]:.3g} with a louder head"
        yield failed(
            "softcap",
            f"the config says {wanted:g}; logits {seen}",
            "the head must return cap * tanh(logits / cap)",
        )
    else:
        source = "as the config says" if wanted else "the config names none"
        yield passed("softcap", f"logits saturate at {cap:.4g}, {source}")


def check_norms(subject: Subject) -> Iterator[Finding]:
    """Heading "norm epsilon": measured on each norm, from how it answers to small inputs.

    For inputs ±c of mean zero, a norm returns weight · c / sqrt(c² + epsilon).
    """
    declared = subject.setting(
        "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"
    )
    if not isinstance(declared, float) or declared <= 0:
        yield not_applicable("norm epsilon", "the config names none")
        return
    # Norms inside attention may have an epsilon of their own (DeepSeek: always 1e-6).
    inside = tuple(f"{found.path}." for found in attention_calls(subject))
    norms = [(p, m) for p, m in subject.model.named_modules() if is_norm(p, m)]
    measured = {p: _epsilon(m, declared) for p, m in norms if not p.startswith(inside)}
    measured = {path: epsilon for path, epsilon in measured.items() if epsilon is not None}
    wrong = {p: e for p, e in measured.items() if not 0.5 * declared < e < 2 * declared}
    if not measured:
        yield not_applicable("norm epsilon", "no norm modules with weights were found")
    elif wrong:
        path, epsilon = min(wrong.items(), key=lambda item: item[0].count("."))
        yield failed(
            "norm epsilon",
            f"{len(wrong)} of {len(measured)} norms, such as {path}: {epsilon:.2g}, the config "
            f"says {declared:g}",
            "epsilon is left at its default, stands outside the root, or comes from another model",
        )
    else:
        yield passed("norm epsilon", f"{declared:g} in all {len(measured)} norms, measured")


def is_norm(path: str, module: nn.Module) -> bool:
    """Whether a module is a norm with a weight for each feature."""
    weight = module.get("weight")
    named = "norm" in path.rpartition(".")[2] or "ln" in path.rpartition(".")[2]
    return named and not module.children() and isinstance(weight, mx.array) and weight.ndim == 1


def _epsilon(module: nn.Module, guess: float) -> float | None:
    signs = 1.0 - 2.0 * (mx.arange(module.weight.size) % 2)
    if signs.size % 2:
        return None  # its mean is not zero
    small = guess**0.5
    try:
        nothing, quiet, loud = (module(c * signs[None, None]) for c in (0.0, small, 1e3))
        ratio = mx.median(mx.abs((quiet - nothing) / (loud - nothing))).item()
    except Exception:
        return None  # it takes other inputs than the hidden states
    return small**2 * (1 / ratio**2 - 1) if ratio > 0 else None


def check_weights(subject: Subject) -> Iterator[Finding]:
    """Heading "weights": no parameter outside the file was left random (needs a LoadReport)."""
    report = subject.report
    if report is None:
        yield not_applicable("weights", "no LoadReport was given: report=…")
        return
    names = {name for name, _ in tree_flatten(subject.model.parameters())}
    loaded = set(report.loaded)
    adapters = {name for name in names if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")}
    left = sorted(names - loaded - adapters - {_wrapped(name) for name in loaded})
    if left or not report.complete:
        named = ", ".join(left[:NAMED]) + (", …" if len(left) > NAMED else "")
        yield failed(
            "weights",
            f"{len(left)} parameters are not in the file{': ' if left else ''}{named}; {report}",
            "they hold the random numbers they were made with: rename the tensors, or turn off "
            "the biases that the file does not have",
        )
    else:
        yield passed("weights", f"all {len(names - adapters)} parameters come from the file")


def _wrapped(name: str) -> str:
    # An adapter keeps the layer that it wraps one level further down.
    stem, _, kind = name.rpartition(".")
    return f"{stem}.linear.{kind}"


def _as_wide_as_vocabulary(module: nn.Module, vocab_size: int) -> bool:
    weight = module.get("weight")
    plain = isinstance(module, (*EMBEDDINGS, nn.Linear)) and not isinstance(module, QUANTISED)
    return plain and isinstance(weight, mx.array) and weight.shape[0] == vocab_size


@contextlib.contextmanager
def _weights(module: nn.Module, weight: mx.array) -> Iterator[None]:
    original = module.weight
    module.weight = weight
    try:
        yield
    finally:
        module.weight = original
