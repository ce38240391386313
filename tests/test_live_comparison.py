"""Pictures of many runs say what their numbers say."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.toy import write_jsonl
from tests.toy_panel import toy_report
from tests.toy_runs import toy_run, write_job
from workbench.errors import ConfigError
from workbench.live import comparison
from workbench.live.comparison import draw_heat_map, draw_runs
from workbench.live.history import History
from workbench.live.runs import read_reports
from workbench.runs.grids import folder_name
from workbench.runs.results import record_results
from workbench.runs.table import runs

RANKS, RATES = (2, 8, 16), (1e-4, 1e-3)


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


@pytest.fixture
def table(tmp_path):
    """A sweep of ranks and learning rates; one of them has not run."""
    for rank in RANKS:
        for rate in RATES:
            folder = tmp_path / f"rank-{rank}-{rate}"
            parameters = {"rank": rank, "learning_rate": rate, "run_dir": str(folder)}
            if (rank, rate) == (16, 1e-3):
                write_job(folder, "failed", parameters=parameters)
                continue
            write_job(toy_run(folder, 0), parameters=parameters)
            losses = [4 * math.exp(-step * rank * rate * 20) + 1 for step in range(30)]
            reports = [
                toy_report(step, loss, valid_loss=loss + 1 if step % 10 == 0 else None)
                for step, loss in enumerate(losses, 1)
            ]
            write_jsonl(folder / "metrics.jsonl", map(dataclasses.asdict, reports))
            record_results(folder, accuracy=rank / 16 + rate * 100)
    return runs(tmp_path)


@pytest.fixture
def drawn(monkeypatch):
    """Titles, lines, labels and texts of what is drawn."""
    found, own = {}, comparison.png

    def look(figure):
        axes = figure.axes[0]
        found["title"] = figure.get_suptitle().replace("\n", " ")
        found["lines"] = {line.get_label(): line.get_xydata() for line in axes.lines}
        found["texts"] = {text.get_text(): text.get_position() for text in axes.texts}
        found["axes"] = (axes.get_xlabel(), axes.get_ylabel())
        found["limits"] = axes.get_ylim()
        found["ticks"] = [
            [t.get_text() for t in a.get_ticklabels()] for a in (axes.xaxis, axes.yaxis)
        ]
        return own(figure)

    monkeypatch.setattr(comparison, "png", look)
    return found


def test_curves_are_those_of_the_runs(table, drawn):
    picture = pixels(draw_runs(table))
    assert picture[0, 0, 3] == 0  # a ground of its own would hide the page's
    assert len(drawn["lines"]) == 5
    smooth = History(read_reports(table.folder[0]))["smooth loss"]
    name = "rank 16, learning rate 0.0001"  # the parameters that differ; folders say nothing
    np.testing.assert_allclose(drawn["lines"][name][:, 1], smooth)
    assert drawn["axes"] == ("step (optimizer updates)", "loss, smoothed (nats)")
    ends = {name: line[-1, 1] for name, line in drawn["lines"].items()}
    assert list(ends.values()) == sorted(ends.values(), reverse=True)  # as the legend has them
    best = min(ends, key=ends.get)
    left_out = "(1 without any left out)"
    assert drawn["title"] == f"Lowest loss at the end: {best}, with {ends[best]:.3g} {left_out}"


def test_other_curves_and_labels(table, drawn):
    draw_runs(table, y="valid_loss", labels="rank")
    assert {len(line) for line in drawn["lines"].values()} == {3}
    assert "rank 2 · rank-2-0.0001" in drawn["lines"]  # no two the same
    draw_runs(table[table["parameters.rank"] == 8], "tokens_per_second", ["learning_rate"])
    assert set(drawn["lines"]) == {"learning rate 0.0001", "learning rate 0.001"}
    assert drawn["title"] == "Tokens per second of 2 runs"
    draw_runs(table.head(1), labels=[])
    assert list(drawn["lines"]) == ["rank-16-0.0001"]


def test_a_run_that_went_astray_does_not_press_the_others_flat(tmp_path, drawn):
    for number in range(4):
        losses = [3 * 0.9**step + 0.1 + number / 10 for step in range(30)]
        losses = [10.0**step for step in range(30)] if number == 3 else losses
        reports = [toy_report(step, loss) for step, loss in enumerate(losses, 1)]
        write_jsonl(toy_run(tmp_path / f"{number}", 0) / "metrics.jsonl", map(vars, reports))
    table = runs(tmp_path)
    draw_runs(table)
    assert drawn["limits"][1] < 5
    assert len(drawn["lines"]) == 4
    assert drawn["title"].endswith("; 1 beyond the picture")
    draw_runs(table.tail(2))
    assert drawn["limits"][1] < 5
    for part in (table.head(3), table.tail(1)):
        draw_runs(part)
        assert "beyond" not in drawn["title"]
    assert drawn["limits"][1] > 1e28, "alone it is drawn whole"


def test_no_curve_is_lost_where_labels_are_cut(tmp_path, drawn):
    settings = {"source": "smollm2-135m-instruct", "number_of_capitals": 120}
    for rank, rate, layers, seed in itertools.product([1, 4], [1e-3, 3e-3], [16, 32], [0, 1]):
        own = {"rank": rank, "learning_rate": rate, "layers_that_are_trained": layers, "seed": seed}
        folder = toy_run(tmp_path / folder_name(settings | own))
        write_job(folder, parameters=settings | own)
    table = runs(tmp_path)
    draw_runs(table)
    assert len(drawn["lines"]) == 16
    folders = [name[-10:] for name in table.name]  # a sweep's end in what tells them apart
    assert sorted(name[-10:] for name in drawn["lines"]) == sorted(folders)
    draw_runs(table, labels=["learning_rate"])
    assert len(drawn["lines"]) == 16
    assert any(name.startswith("learning rate 0.003 · …") for name in drawn["lines"])
    draw_runs(pd.concat([table, table]), labels=[])
    assert len(drawn["lines"]) == 32
    assert sum(name.endswith(" (2)") for name in drawn["lines"]) == 16
    assert max(map(len, drawn["lines"])) < 70


def test_a_folder_is_drawn_and_hostile_names_are_only_text(tmp_path, drawn):
    folder = toy_run(tmp_path / "$\\frac{$ <b>")
    (folder / "config.json").write_text(json.dumps({"a": "$\\frac{$"}))
    toy_run(tmp_path / "other")
    assert pixels(draw_runs(tmp_path)).shape[2] == 4
    assert any("frac" in name for name in drawn["lines"])


def test_what_cannot_be_drawn_is_named(table, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown curve 'los'. Use one of loss, valid_loss"):
        draw_runs(table, "los")
    with pytest.raises(ConfigError, match="no column 'rink'"):
        draw_runs(table, labels="rink")
    with pytest.raises(ConfigError, match="no run of the table has a loss"):
        draw_runs(table[table.state == "failed"])
    many = table.loc[table.index.repeat(10)]
    with pytest.raises(ConfigError, match="60 curves cannot be told apart"):
        draw_runs(many)


def test_the_heat_map_has_a_number_a_cell(table, drawn):
    picture = pixels(draw_heat_map(table, "rank", "learning_rate", "accuracy"))
    assert picture[0, 0, 3] == 0
    assert drawn["axes"] == ("rank", "learning rate")
    assert drawn["ticks"] == [["2", "8", "16"], ["0.001", "0.0001"]]
    numbers = {f"{rank / 16 + rate * 100:.3g}" for rank in RANKS for rate in RATES} - {"1.1"}
    assert set(drawn["texts"]) == numbers
    assert drawn["texts"]["0.6"] == (1, 0)  # rank 8, 1e-3
    assert drawn["title"] == "Highest accuracy: 1.01 at rank 16, learning rate 0.0001"
    draw_heat_map(table, "rank", "learning_rate", "loss")
    assert drawn["title"].startswith("Lowest loss: ")
    assert "rank 8, learning rate 0.001" in drawn["title"]


def test_cells_are_means_of_their_runs(table, drawn):
    table["result.accuracy"] = [0.0, 1.0, 0.5, 0.25, 0.6, math.nan]
    table["parameters.rank"] = ["$a$", "$a$", "b", "b", "b", "c"]
    table["parameters.learning_rate"] = 1.0
    draw_heat_map(table, "rank", "learning_rate", "accuracy", largest=False)
    assert drawn["texts"] == {"0.5": (0, 0), "0.45": (1, 0)}
    assert drawn["title"] == "Lowest accuracy: 0.45 at rank b, learning rate 1"
    assert drawn["ticks"][0] == ["$a$", "b", "c"]
    table["result.accuracy"] = 1.0
    draw_heat_map(table, "rank", "learning_rate", "accuracy")
    assert drawn["title"].endswith(", and in 2 more")


def test_what_makes_no_heat_map_is_named(table):
    with pytest.raises(ConfigError, match="three columns"):
        draw_heat_map(table, "rank", "rank", "accuracy")
    with pytest.raises(ConfigError, match="holds what is no number"):
        draw_heat_map(table, "rank", "learning_rate", "model")
    with pytest.raises(ConfigError, match=r"no run has a result\.accuracy"):
        draw_heat_map(table[table.state == "failed"], "rank", "learning_rate", "accuracy")
    wide = table.loc[table.index.repeat(10)].assign(**{"parameters.rank": range(60)})
    with pytest.raises(ConfigError, match="too many to read"):
        draw_heat_map(wide, "rank", "learning_rate", "accuracy")
