"""Everything that shows text of other people: HTML pieces and pictures, made with a given text."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pandas as pd

from tests.toy import toy_dataset, toy_model
from workbench.backend import Backend
from workbench.evaluation.report import BehaviourReport, RowResult
from workbench.evaluation.suite_rows import FreeRow, Phrase
from workbench.evaluation.suites import Suite
from workbench.live import answers, behaviour, figures, gradients, memory, slicing, tiles, weights
from workbench.live.history import History
from workbench.live.samples import Sample, samples_html
from workbench.models.report import LoadReport, TensorRecord
from workbench.probes.alive import what_is_alive
from workbench.probes.findings import CheckReport, failed, not_applicable, passed
from workbench.probes.leaks import find_leak
from workbench.probes.memory import MemoryReading
from workbench.probes.planner import plan_memory

CURVE = [1e6 * step for step in range(1, 40)]


def load_report(text: str) -> str:
    """The table of loaded tensors."""
    record = TensorRecord(text, "unexpected", file_shape=(2,), file_dtype=text)
    return LoadReport([record], text, [text])._repr_html_()


def check_report(text: str) -> str:
    """The table of a check."""
    findings = (passed(text, text), failed(text, text, text), not_applicable(text, text))
    return CheckReport(text, findings, 0.1)._repr_html_()


def alive_report(text: str) -> str:
    """The table of living arrays."""
    return what_is_alive(**{text: {text.replace(".", ""): mx.zeros(3)}})._repr_html_()


def data_set(text: str) -> str:
    """A data set's description."""
    return dataclasses.replace(toy_dataset([4]), name=text)._repr_html_()


def backend(text: str) -> str:
    """The machine's table."""
    blas = SimpleNamespace(name=text, source=text, warning=text)
    return Backend(text, blas, 1.0, 1, 10**9, 10**9, {text: text})._repr_html_()


def memory_plan(text: str) -> str:
    """A predicted run's table."""
    plan = plan_memory(toy_model().config, length=16)
    model = dataclasses.replace(plan.request.model, name=text)
    named = dataclasses.replace(plan, request=dataclasses.replace(plan.request, model=model))
    return named._repr_html_()


def samples(text: str) -> str:
    """Answers during training."""
    return samples_html([Sample(1, text, text), Sample(2, text, text)])


def heading(text: str) -> str:
    """The panel's status."""
    return tiles.heading_html(tiles.Status(f"Failed: {text}", 1, 2, 3.0, note=text), History())


def made_report(text: str) -> BehaviourReport:
    """Scores of one suite."""
    result = RowResult(text, text, text, text, text, 1.0, text, text, 0.5, text)
    row = FreeRow(text, text, text, indicators=(Phrase((text,)),))
    suites = (Suite(text, (row,), text, 0.5),)
    return BehaviourReport(text, text, suites, (result,), 0.5, 0.0)


def behaviour_report(text: str) -> str:
    """Scores by suite; the page with the answers is looked at in test_behaviour."""
    return made_report(text)._repr_html_()


HTML = (
    load_report,
    check_report,
    alive_report,
    data_set,
    backend,
    memory_plan,
    samples,
    heading,
    behaviour_report,
)


def accuracy(text: str) -> bytes:
    """Answers before and after."""
    columns = {"trained": [True], "before (%)": [10.0], "after (%)": [90.0]}
    return answers.draw_accuracy(pd.DataFrame(columns, index=[text]))


def shift(text: str) -> bytes:
    """Tokens and targets."""
    return slicing.draw_shift([text, text, "x"], [False, True, True])


def masks(text: str) -> bytes:
    """Tokens of a batch."""
    return slicing.draw_masks([[text, "x"]], np.array([[False, True]]))


def drift(text: str) -> bytes:
    """Caches by name."""
    return slicing.draw_drift({text: [1e-7, 2e-7]}, 1e-5)


def phases(text: str) -> bytes:
    """Phases by name."""
    reading = MemoryReading(1, 1, 1)
    phase = SimpleNamespace(
        name=text, seconds=1.0, before=reading, after=reading, peak_bytes=2 * 10**6
    )
    return memory.draw_phases([phase])


def loops(text: str) -> bytes:
    """Loops by name."""
    table = pd.DataFrame({"active_bytes": CURVE, "process_bytes": CURVE})
    return memory.draw_loops({text: table})


def leak(text: str) -> bytes:
    """Leaks by name."""
    return memory.draw_leak({text: CURVE}, {text: find_leak(CURVE)})


def guard(text: str) -> bytes:
    """Events of a guarded run."""
    return memory.draw_guard([10**9, 2 * 10**9], 3 * 10**9, {2: text})


def slopes(text: str) -> bytes:
    """Claims by name."""
    return gradients.draw_slopes([1.0, 2.0], {text: [1.0, 2.0]})


def gradient_map(text: str) -> bytes:
    """Gradients of modules by name."""
    names = [f"model.layers.0.{text}.weight", f"{text}.weight"]
    return gradients.draw_gradients({text: pd.Series([1.0, 2.0], names)})


def model_bytes(text: str) -> bytes:
    """Tensors by name and dtype."""
    table = pd.DataFrame(
        {
            "name": [f"model.layers.0.{text}.weight", f"model.layers.0.{text}2.weight", text],
            "file_dtype": [text] * 3,
            "file_bytes": [10**6] * 3,
            "num_bytes": [10**6] * 3,
        }
    )
    return weights.draw_bytes(table)


def suites(text: str) -> bytes:
    """Scores by suite."""
    return behaviour.draw_suites(made_report(text))


def title(text: str) -> bytes:
    """The parts that all pictures share."""
    figure = figures.new_figure(4, 2)
    axes = figure.subplots()
    axes.plot([1], [1], label=text)
    figures.headline(figure, text)
    figures.label(axes, 1, 1, text)
    figures.name_axes(axes, "x", "y", text)
    figures.add_legend(axes)
    return figures.png(figure)


PICTURES = (
    accuracy,
    shift,
    masks,
    drift,
    phases,
    loops,
    leak,
    guard,
    slopes,
    gradient_map,
    model_bytes,
    suites,
    title,
)


def render(argument: list) -> dict[str, object]:
    """Show a text in each of the ways; HTML as it is, pictures as whether they are PNG."""
    text, pictures = argument
    if pictures:
        return {draw.__name__: draw(text)[:8].hex() for draw in PICTURES}
    return {write.__name__: write(text) for write in HTML}
