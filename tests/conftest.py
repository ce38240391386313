"""Fixtures. `workbench` is imported first: it loads the BLAS before MLX."""

from __future__ import annotations

import workbench as wb  # isort: split

import mlx.core as mx
import pytest

from tests.faults.cases import count
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
