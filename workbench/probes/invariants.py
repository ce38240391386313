"""Is this network a correct causal language model?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.nn as nn

from workbench.errors import ConfigError
from workbench.models.loading import BaseModel
from workbench.models.report import LoadReport
from workbench.probes.findings import CheckReport, Finding, failed, not_applicable, passed
from workbench.probes.model_checks.caches import check_cache
from workbench.probes.model_checks.gradients import check_gradients
from workbench.probes.model_checks.heads import check_grouped_heads
from workbench.probes.model_checks.order import check_order
from workbench.probes.model_checks.output import (
    check_dtype,
    check_finite,
    check_output,
    check_targets,
)
from workbench.probes.model_checks.parts import (
    check_head,
    check_norms,
    check_softcap,
    check_weights,
)
from workbench.probes.model_checks.positions import check_offset
from workbench.probes.model_checks.reference import check_reference
from workbench.probes.model_checks.sequence import check_batch, check_causality, check_padding
from workbench.probes.model_checks.subject import (
    CallFailedError,
    Subject,
    awakened,
    prepared,
    zero_matrices,
)
from workbench.probes.model_checks.text import check_text, check_tokenizer

Check = Callable[[Subject], Iterable[Finding]]
CHECKS: dict[str, Check] = {  # heading → check; some give a second heading
    "finite": check_finite,
    "dtype": check_dtype,
    "loss": check_targets,
    "causality": check_causality,
    "batch": check_batch,
    "padding": check_padding,
    "cache": check_cache,
    "position order": check_order,
    "position offset": check_offset,
    "grouped heads": check_grouped_heads,
    "head": check_head,
    "softcap": check_softcap,
    "norm epsilon": check_norms,
    "gradients": check_gradients,
    "weights": check_weights,
    "tokenizer": check_tokenizer,
    "text": check_text,
}
AS_THEY_ARE = ("finite", "dtype", "weights", "tokenizer", "text", "reference")  # the weights


def check_model(
    model: nn.Module | BaseModel,
    tokenizer: object = None,
    *,
    reference: object = None,
    report: LoadReport | None = None,
    skip: Sequence[str] = (),
) -> CheckReport:
    """Check that a network is a correct causal language model.

    For any MLX model that is called as `model(tokens)` or `model(tokens, cache=…)` with tokens
    (B, T) and returns logits (B, T, V): ours, mlx-lm's, your own port. What a kind of model does
    not have (RoPE, a KV cache, grouped heads, …) is told apart by its structure and reported as
    not applicable. Floating-point weights are checked as float32, and random numbers stand
    in for matrices of zeros, as a network may start with; the model is left as it was.

    Args:
        model: the network, or what `load_model` returned (its tokenizer and report come along).
        tokenizer: with `encode(text)` and a length; trained weights are then tried on English.
        reference: another network, (tokens, logits), or a .safetensors file with both; the
            first module that departs from it is named.
        report: what became of every tensor when the weights were loaded.
        skip: headings to leave out, such as "gradients" for a model that fills the memory.

    Raises:
        ConfigError: the model is not an mlx.nn.Module, or a heading to skip does not exist.
    """
    config = None
    if isinstance(model, BaseModel):
        base, model = model, model.model
        tokenizer, report = tokenizer or base.tokenizer, report or base.report
        config = base.config
    _check_arguments(model, skip)
    reference = reference.model if isinstance(reference, BaseModel) else reference
    started = time.perf_counter()
    with prepared(model) as dtypes:
        subject = Subject(model, config, tokenizer, report, dtypes)
        findings = tuple(_all_findings(subject, reference, skip))
    return CheckReport(type(model).__name__, findings, time.perf_counter() - started)


def _check_arguments(model: object, skip: Sequence[str]) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"check_model needs an mlx.nn.Module, got a {type(model).__name__}")
    unknown = [name for name in skip if name not in {*CHECKS, "reference"}]
    if unknown:
        raise ConfigError(f"no check is named {unknown}", cure=f"There are {', '.join(CHECKS)}.")


def _all_findings(subject: Subject, reference: object, skip: Sequence[str]) -> Iterator[Finding]:
    first = list(_guarded("output", check_output, subject))
    yield from first
    runs = not any(finding.status == "FAILED" for finding in first)

    def compare(subject: Subject) -> Iterator[Finding]:
        return check_reference(subject, reference)

    zeros = zero_matrices(subject.model)
    if zeros:
        text = f"random numbers stood in for {len(zeros)} matrices of zeros, such as {zeros[0]}"
        yield passed("zeros", text)
    for heading, check in {**CHECKS, "reference": compare}.items():
        if heading in skip:
            yield not_applicable(heading, "left out by request")
        elif runs or check is check_weights or check is check_tokenizer:
            with awakened(subject.model, [] if heading in AS_THEY_ARE else zeros):
                yield from _guarded(heading, check, subject)
        else:
            yield not_applicable(heading, "the model gives no logits to look at")


def _guarded(heading: str, check: Check, subject: Subject) -> Iterator[Finding]:
    """The check's findings; whatever the model raises becomes one, too."""
    try:
        yield from check(subject)
    except CallFailedError as error:
        yield failed(heading, str(error), "the model cannot be called this way: see the message")
