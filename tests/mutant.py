"""A deliberately broken model or training step, and the heading under which it must be caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.probes.findings import CheckReport

BUGS = {  # of the earlier systems, by number
    1: "shift",
    2: "causal mask",
    3: "rotary positions",
    4: "grouped heads",
    5: "partial load",
    6: "KV cache",
    7: "padding and mask",
    8: "what trains",
    9: "resume",
    10: "dead loss term",
    11: "no evaluation",
    12: "epsilon, norm, softcap, head",
}


@dataclass(frozen=True)
class Mutant:
    """A few wrong lines over correct code.

    `bug` is a number in `BUGS`; `check` is the heading under which `run()` must fail.
    """

    name: str
    bug: int
    check: str
    run: Callable[[], CheckReport]


def mutant_table(mutants: Sequence[Mutant], reports: Sequence[CheckReport]) -> pd.DataFrame:
    """One row a mutant: bug, name, the expected heading, whether it was caught, and where else."""
    rows = []
    for mutant, report in zip(mutants, reports):
        caught = mutant.check in report.failed_checks
        details = [f.detail for f in report.failures if f.check == mutant.check]
        rows.append(
            {
                "bug": f"{mutant.bug}. {BUGS[mutant.bug]}",
                "mutant": mutant.name,
                "check": mutant.check,
                "caught": caught,
                "also under": ", ".join(sorted(report.failed_checks - {mutant.check})),
                "what it says": details[0] if details else "",
            }
        )
    return pd.DataFrame(rows)
