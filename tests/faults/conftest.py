"""The server of the fault suite, and what is to be spoilt."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.cases import Server
from tests.toy import save_toy_folder
from tests.toy_adapters import adapted
from workbench.export.adapters import save_adapter

MODULES = ("tests.faults.actions", "tests.faults.fuzz", "tests.faults.rendering")


@pytest.fixture(scope="session")
def server():
    """A process that forks for every case."""
    server = Server(*MODULES)
    yield server
    server.close()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A model, an adapter and a data set in one folder; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("saved")
    save_toy_folder(folder / "model")
    save_adapter(adapted(), folder / "adapter")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy of the model's folder, to be spoilt."""
    return shutil.copytree(saved / "model", tmp_path / "model")
