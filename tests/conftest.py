"""Fixtures. `workbench` is imported first: it loads the BLAS before MLX."""

from __future__ import annotations

import workbench as wb  # isort: split

import mlx.core as mx
import pytest

from tests.faults.cases import TABLE, add, count, table
from tests.toy import save_toy_folder, toy_base, toy_tokenizer


def pytest_collection_modifyitems(items):
    """Whatever uses the real model is marked `real`."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


@pytest.fixture(scope="session")
def smollm2():
    """The real model, float32; tests must leave it as they found it."""
    return wb.load_model("smollm2-135m", dtype=mx.float32)


@pytest.fixture
def base():
    """A toy model with its tokenizer."""
    return toy_base()


@pytest.fixture
def tokenizer():
    """A tokenizer of single bytes."""
    return toy_tokenizer()


@pytest.fixture
def model_folder(tmp_path):
    """A toy model as a Hugging Face folder."""
    return save_toy_folder(tmp_path / "toy-model")


@pytest.fixture(autouse=True)
def in_the_table_of_faults(request):
    """Count a test that is marked `fault` under its class."""
    yield
    if mark := request.node.get_closest_marker("fault"):
        count(mark.args[0], "result")


def pytest_sessionfinish(session):
    """One of several processes hands its tables over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = {fault: dict(row) for fault, row in TABLE.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take the tables of a process that has ended."""
    for fault, row in getattr(node, "workeroutput", {}).get("faults", {}).items():
        add(fault, row)


def pytest_terminal_summary(terminalreporter):
    """Print the tables that tests recorded, and that of the faults."""
    for report in terminalreporter.getreports("passed"):
        for title, text in report.user_properties:
            terminalreporter.section(title)
            terminalreporter.write_line(text)
    if TABLE:
        terminalreporter.section("faults")
        for line in table():
            terminalreporter.write_line(line)
