"""What a workload's measurements say: medians, ratios of pairs, peaks, losses."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from workbench.benchmarks.workloads import MLX_LM, MLX_LM_BLAS, OURS, TORCH_BF16, Workload

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

    @property
    def start_gap(self) -> float:
        """Largest difference of a float32 peer's loss from ours before the first step, in nats."""
        return self._gap("first loss", "loss before", TORCH_BF16)

    @property
    def end_gap(self) -> float:
        """The same after the last step, of the peers that made every step.

        With padding mlx-lm trains other targets, and so goes another way: it is left out there.
        """
        padded = (MLX_LM, MLX_LM_BLAS) if self.workload.kind == "chat" else ()
        return self._gap("last loss", "loss after", TORCH_BF16, *padded, whole=True)

    def _gap(self, text: str, chat: str, *without: str, whole: bool = False) -> float:
        if self.workload.kind == "serve":
            return 0.0
        table = self.summary
        if whole:
            table = table[table["steps"] == table.loc[OURS, "steps"]]
        losses = table[chat if self.workload.kind == "chat" else text]
        losses = losses.drop(list(without), errors="ignore")
        return float((losses - losses[OURS]).abs().max())

    def record(self) -> dict[str, object]:
        """Everything as plain data, for a JSON file."""
        return {
            "workload": self.workload.name,
            "heading": self.workload.heading,
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
        return f"{self.workload.heading} ({self.seconds:.0f} s){out}"


def headlines(results: Iterable[Comparison]) -> pd.DataFrame:
    """One table of all workloads: a row for each peer, with the ratio that counts.

    That is the median of paired steps where all steps are alike, and the ratio of the sums where
    an epoch is measured: its batches differ, and what is computed once must be paid for.
    """
    tables = []
    for result in results:
        table = result.summary.reset_index()
        in_sum = result.workload.kind == "chat"
        table["ratio"] = table["times slower in sum" if in_sum else "times slower"]
        name, _, title = result.workload.heading.partition(": ")
        table.insert(0, "workload", name)
        table.insert(1, "title", title)
        if "what" in table:
            table["title"] = table.pop("what")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


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
    pairs = own.assign(seconds_ours=raw[raw["peer"] == OURS].set_index("step")["seconds"])
    settled = pairs.iloc[1:] if len(pairs) > 1 else pairs
    ratios = settled["seconds"] / settled["seconds_ours"]
    speed = {
        "steps": len(own),
        "median s": settled["seconds"].median(),
        "sum s": own["seconds"].sum(),
        "times slower": ratios.median(),
        "least": ratios.min(),
        "most": ratios.max(),
        "times slower in sum": (pairs["seconds"].sum() / pairs["seconds_ours"].sum()),
    }
    if "tokens" in own:
        speed["tokens/s"] = (settled["tokens"] / settled["seconds"]).median()
    return speed


def _plain(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows as dictionaries in which what is missing is None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
