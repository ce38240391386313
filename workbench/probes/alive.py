"""What holds the memory: arrays by name, largest first."""

from __future__ import annotations

import html
from dataclasses import dataclass

import mlx.core as mx
import pandas as pd
from mlx.utils import tree_flatten

from workbench.errors import ConfigError
from workbench.probes.memory import read_memory

MEGA = 1e6
SHOWN = 12  # arrays that a report lists


@dataclass(frozen=True, repr=False)
class AliveReport:
    """Arrays by name, their sums by kind, and what MLX holds beside them."""

    table: pd.DataFrame  # kind, name, shape, dtype, bytes; largest first; an array stands once
    active_bytes: int  # all that MLX has in use

    @property
    def named_bytes(self) -> int:
        """Bytes of the arrays that were given names."""
        return int(self.table["bytes"].sum())

    @property
    def unnamed_bytes(self) -> int:
        """In use, but in none of the given trees: activations, copies, a leak."""
        return self.active_bytes - self.named_bytes

    @property
    def by_kind(self) -> pd.Series:
        """Bytes of each kind, largest first."""
        return self.table.groupby("kind")["bytes"].sum().sort_values(ascending=False)

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, shape and type, MB), as they are shown."""
        largest = [
            (f"{row.kind}: {row.name}", f"{row.shape} {row.dtype}", f"{row.bytes / MEGA:.1f} MB")
            for row in self.table.head(SHOWN).itertuples(index=False)
        ]
        kinds = [
            (f"{kind} in all", f"{(self.table.kind == kind).sum()} arrays", f"{b / MEGA:.1f} MB")
            for kind, b in self.by_kind.items()
        ]
        return [*largest, *kinds, ("without a name", "", f"{self.unnamed_bytes / MEGA:.1f} MB")]

    def __str__(self) -> str:
        return "\n".join(
            f"{size:>12}  {what}  {shape}".rstrip() for what, shape, size in self.rows()
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{html.escape(what)}</td>"
            f"<td style='text-align:left'>{html.escape(shape)}</td>"
            f"<td>{html.escape(size)}</td></tr>"
            for what, shape, size in self.rows()
        )
        return f"<table>{cells}</table>"


def what_is_alive(**trees: object) -> AliveReport:
    """Name the arrays that are alive, largest first.

    Args:
        trees: kind → a tree of arrays (dicts and lists), for example
            `parameters=model.parameters(), optimizer=trainer.optimizer.state`.

    An array that stands in two trees is counted under the first. Arrays that are still to be
    computed hold no memory yet and count with the size they will have: evaluate first.

    Raises:
        ConfigError: a tree holds no array.
    """
    seen, rows = set(), []
    for kind, tree in trees.items():
        arrays = [(name, a) for name, a in tree_flatten(tree) if isinstance(a, mx.array)]
        if not arrays:
            raise ConfigError(f"{kind} holds no mx.array", cure="Give a tree of arrays.")
        for name, array in arrays:
            if id(array) not in seen:
                seen.add(id(array))
                shape = " × ".join(map(str, array.shape)) or "scalar"
                dtype = str(array.dtype).removeprefix("mlx.core.")
                rows.append((kind, name, shape, dtype, array.nbytes))
    columns = ["kind", "name", "shape", "dtype", "bytes"]
    table = pd.DataFrame(rows, columns=columns).sort_values("bytes", ascending=False, kind="stable")
    return AliveReport(table.reset_index(drop=True), read_memory().active_bytes)
