"""Answers before and after training, as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from workbench.live.figures import INK, headline, literal_ticks, new_figure, png

BEFORE, AFTER = "#b3bac2", "#2f6fde"


def accuracy_table(before: pd.DataFrame, after: pd.DataFrame, trained: set[str]) -> pd.DataFrame:
    """Share of right answers by phrasing, in percent, before and after training.

    Args:
        before, after: tables of `ask_capitals`.
        trained: the phrasings that were trained.
    """
    table = pd.DataFrame(
        {
            "before (%)": 100 * before.groupby("phrasing", sort=False)["correct"].mean(),
            "after (%)": 100 * after.groupby("phrasing", sort=False)["correct"].mean(),
        }
    ).round(0)
    table.insert(0, "trained", [phrasing in trained for phrasing in table.index])
    table.index = [phrasing.replace("{country}", "X") for phrasing in table.index]
    return table


def draw_accuracy(table: pd.DataFrame) -> bytes:
    """The accuracy table as horizontal bars, as PNG bytes with a transparent ground."""
    figure = new_figure(12, 1.3 + 0.75 * len(table))
    axes = figure.subplots()
    for place, (_, row) in enumerate(table.iterrows()):
        for shift, column, color in ((0.19, "before (%)", BEFORE), (-0.19, "after (%)", AFTER)):
            at, value = len(table) - 1 - place + shift, row[column]
            axes.barh(at, value, height=0.34, color=color)
            axes.text(value + 1, at, f"{value:.0f} %", va="center", color=INK, fontsize=10)
    labels = [
        f"{phrasing}\n({'trained' if row['trained'] else 'never trained'})"
        for phrasing, row in table.iterrows()
    ]
    axes.set_yticks(range(len(table) - 1, -1, -1), labels, color=INK, fontsize=10)
    literal_ticks(axes)
    axes.set_xlim(0, 110)
    axes.set_xlabel("right answers (%)", color=INK)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    headline(figure, _finding(table))
    figure.tight_layout()
    return png(figure)


def _finding(table: pd.DataFrame) -> str:
    means: Mapping[bool, pd.DataFrame] = {
        trained: part[["before (%)", "after (%)"]].mean()
        for trained, part in table.groupby("trained")
    }
    parts = [
        f"{'trained' if trained else 'never-trained'} phrasings "
        f"{mean['before (%)']:.0f} % → {mean['after (%)']:.0f} %"
        for trained, mean in sorted(means.items(), reverse=True)
    ]
    return "Right answers (grey before, blue after): " + ", ".join(parts)
