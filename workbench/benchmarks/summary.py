"""What a workload's measurements say: medians, ratios of pairs, peaks, losses."""

from __future__ import annotations

import html
from dataclasses import dataclass

import pandas as pd

from workbench.benchmarks.workloads import OURS, Workload

GIGA = 1e9


@dataclass(frozen=True, repr=False)
class Comparison:
    """One workload, measured; shows itself as a table.

    A ratio above 1 says that ours is faster, or that a peer needs more memory. Speed ratios are of
    pairs: the same step, made by ours and by the peer right after each other.
    """

    workload: Workload
    raw: pd.DataFrame  # a row for each step of each peer
    facts: pd.DataFrame  # by peer: device, matrix product speed, losses before and after
    left_out: dict[str, str]  # peers that could not take part, and why
    seconds: float  # that all of it took

    @property
    def summary(self) -> pd.DataFrame:
        """By peer, or by what was done and peer: see `_summarise`."""
        if "what" not in self.raw:
            return _summarise(self.raw, self.facts)
        tables = {what: _summarise(rows, self.facts) for what, rows in self.raw.groupby("what")}
        return pd.concat(tables, names=["what", "peer"])

    def ratio(self, peer: str, column: str = "times slower") -> float:
        """One number of the summary; NaN if the peer was left out."""
        table = self.summary
        return float(table.loc[peer, column]) if peer in table.index else float("nan")

    def record(self) -> dict[str, object]:
        """Everything as plain data, for a JSON file."""
        return {
            "workload": self.workload.name,
            "title": self.workload.title,
            "seconds": round(self.seconds, 1),
            "left out": self.left_out,
            "summary": _plain(self.summary.reset_index()),
            "facts": _plain(self.facts.rename_axis("peer").reset_index()),
            "raw": _plain(self.raw),
        }

    def __str__(self) -> str:
        return f"{self._heading()}\n{self.summary.round(3).to_string()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._heading())}</p>{self.summary.round(3).to_html()}"

    def _heading(self) -> str:
        out = "".join(f"; without {peer}: {reason}" for peer, reason in self.left_out.items())
        return f"{self.workload.name}: {self.workload.title} ({self.seconds:.0f} s){out}"


def _summarise(raw: pd.DataFrame, facts: pd.DataFrame) -> pd.DataFrame:
    """By peer: steps, median and sum of seconds, paired ratios, peaks and losses."""
    peers = list(raw["peer"].unique())
    table = pd.DataFrame({peer: _speed(raw, peer) for peer in peers}).T.rename_axis("peer")
    for name, label in (("mlx_peak_bytes", "MLX peak"), ("process_peak_bytes", "process peak")):
        if name in raw:
            peaks = raw.groupby("peer")[name].max().reindex(peers)
            table[f"{label} GB"] = peaks / GIGA
            table[f"ours / its {label}"] = peaks[OURS] / peaks
    if "loss" in raw:
        losses = raw.groupby("peer")["loss"].agg(["first", "last"]).reindex(peers)
        table["first loss"], table["last loss"] = losses["first"], losses["last"]
    for name in ("loss_before", "loss_after", "matmul_gflops"):
        if name in facts:
            table[name.replace("_", " ")] = facts[name].reindex(peers).astype(float)
    return table.astype({"steps": int})


def _speed(raw: pd.DataFrame, peer: str) -> dict[str, float]:
    """Seconds of a peer, and their ratios to ours of the same step.

    The first step settles caches and compiled kernels: it counts in the sums, and in medians only
    where a peer makes no other.
    """
    own = raw[raw["peer"] == peer].set_index("step")
    pairs = own.join(raw[raw["peer"] == OURS].set_index("step")["seconds"], rsuffix="_ours")
    settled = pairs.iloc[1:] if len(pairs) > 1 else pairs
    ratios = settled["seconds"] / settled["seconds_ours"]
    speed = {
        "steps": len(own),
        "median s": settled["seconds"].median(),
        "sum s": own["seconds"].sum(min_count=1),
        "times slower": ratios.median(),
        "least": ratios.min(),
        "most": ratios.max(),
        "times slower in sum": (
            pairs["seconds"].sum(min_count=1) / pairs["seconds_ours"].sum(min_count=1)
        ),
    }
    if "tokens" in own:
        speed["tokens/s"] = (settled["tokens"] / settled["seconds"]).median()
    return speed


def _plain(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows as dictionaries in which what is missing is None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
