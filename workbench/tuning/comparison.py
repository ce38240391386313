"""Base against trained: the same network with its adapter on and off."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from workbench.errors import ConfigError
from workbench.evaluation.behaviour import Source, evaluate_suites
from workbench.evaluation.report import BehaviourReport
from workbench.evaluation.suites import Suite
from workbench.models.loading import BaseModel, require_base
from workbench.tuning.lora import adapter_disabled, has_adapter


def run_suites(
    base: BaseModel,
    source: Source | Suite | Sequence[Source | Suite],
    *,
    compare_with_base: bool | None = None,
    baseline: BaseModel | None = None,
    threshold: float | None = None,
    batch_size: int = 32,
) -> BehaviourReport:
    """Run behaviour suites, and compare with the network without its adapter.

    Args:
        base: a loaded model, trained or not.
        source: a suite's .jsonl file (see `evaluation.suites`), a folder of them, what
            `read_suites` gives, or a list of these.
        compare_with_base: answer every row with the adapter switched off, too; None: if there is
            an adapter.
        baseline: another model to compare with, instead.
        threshold, batch_size: as for `evaluate_suites`.

    Raises:
        ConfigError: a comparison without an adapter to switch off, or a source that is none.
        DataError: a row cannot be read or asked; names file and line.
    """
    require_base(base)
    adapted = has_adapter(base.model)
    if compare_with_base and not adapted and baseline is None:
        raise ConfigError(
            "there is no adapter to switch off",
            cure="Attach or load one, give a baseline model, or compare_with_base=False.",
        )
    switch = baseline
    if baseline is None and (adapted if compare_with_base is None else compare_with_base):
        switch = functools.partial(adapter_disabled, base.model)
    return evaluate_suites(
        base, source, baseline=switch, threshold=threshold, batch_size=batch_size
    )
