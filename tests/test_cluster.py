"""Jobs on dask.distributed: real schedulers and workers on loopback, some of them killed."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import wait
from pathlib import Path

import nbformat
import psutil
import pytest

pytest.importorskip("distributed", reason="needs the extra `cluster`")

from tests.dask_cluster import MLX, DaskCluster
from workbench.runs import cluster as cluster_module
from workbench.runs import cluster_connection
from workbench.runs.cluster import on_cluster
from workbench.runs.jobs import Job


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook whose first cell holds the parameters."""
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python",
                                                             "display_name": "Python 3"}})
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = DaskCluster(tmp_path_factory.mktemp("dask"))
    yield made
    made.end()

def test_first(cluster, tmp_path):
    t = time.time()
    cluster.workers(2, *MLX)
    print("workers", time.time() - t)
    t = time.time()
    executor = on_cluster(cluster.address, tmp_path)
    print("connected", time.time() - t, executor.at_once, executor.shares_memory)
    book = write_notebook(tmp_path / "n.ipynb", "n = 0", "import os, time; time.sleep(1)")
    t = time.time()
    outcomes = [executor.submit(Job(book, {"n": n}, tmp_path / f"r{n}")) for n in range(4)]
    for o in outcomes:
        print(o.result(), time.time() - t)
    executor.close()
