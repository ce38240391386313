"""Jobs on dask.distributed: real schedulers and workers on loopback, some of them killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import psutil
import pytest

from tests.dask_cluster import MLX, DaskCluster, paths, wait_for
from tests.process import ROOT
from tests.toy_training import toy_trainer
from workbench.errors import ConfigError, RunError
from workbench.runs import cluster as cluster_module
from workbench.runs import cluster_connection
from workbench.runs.cluster import on_cluster
from workbench.runs.cluster_connection import load_distributed
from workbench.runs.jobs import Job
from workbench.runs.store import read_metrics
from workbench.runs.sweep import Sweep

pytestmark = pytest.mark.skipif(find_spec("distributed") is None, reason="no extra `cluster`")
NOTE = """
import os, pathlib, psutil, time
me = [os.getpid(), *(process.pid for process in psutil.Process().parents())]
pathlib.Path(f"tries-{n}").open("a").write(" ".join(map(str, me)) + "\\n")
first = len(pathlib.Path(f"tries-{n}").read_text().splitlines()) == 1
"""
DIE_OR_WAIT = """
if first and n == 0:
    os._exit(1)
time.sleep(30 if first and n == 3 else 0)
"""
MOUNT = 'mount -t tmpfs none "$0" && exec "$@"'
FOR_EVER = "time.sleep(600)"


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook whose first cell holds the parameters."""
    spec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    book = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return path


def tries(folder: Path, n: int) -> list[list[int]]:
    """For each attempt at job n, its kernel's process and those above it."""
    path = folder / f"tries-{n}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [[int(pid) for pid in line.split()] for line in lines]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler, and two workers for jobs."""
    with DaskCluster(tmp_path_factory.mktemp("dask")) as made:
        made.workers(2, *MLX)
        yield made


@pytest.fixture
def endless(tmp_path):
    """A job that only a cancel ends."""
    book = write_notebook(tmp_path / "endless.ipynb", "n = 1", NOTE, FOR_EVER)
    return Job(book, {}, tmp_path / "run")


def test_a_sweep_of_six_outlives_a_killed_worker_and_a_dead_kernel(cluster, tmp_path):
    book = write_notebook(tmp_path / "six.ipynb", "n = 9", NOTE, DIE_OR_WAIT, "n")
    grid = {"n": [0, 1, 2, 3, 4, 5]}
    root = tmp_path / "sweep"
    sweep = Sweep(book, grid, root, executor=cluster.address, memory=1_000_000, retries=1)
    for _ in sweep:
        if len(tries(tmp_path, 3)) == 1:
            cluster.kill_one_of(tries(tmp_path, 3)[0])
    assert [run.state for run in sweep.runs] == ["finished"] * 6
    assert all((run.folder / "notebook.ipynb").is_file() for run in sweep.runs)
    assert [len(tries(tmp_path, n)) for n in range(6)] == [2, 1, 1, 2, 1, 1]
    assert sweep.runs[0].attempts == 2, "a dead kernel is the sweep's to try again"
    assert sweep.runs[3].attempts == 1, "a killed worker is dask's"
    assert not psutil.pid_exists(tries(tmp_path, 3)[0][0]), "the killed worker's kernel lives on"
    with load_distributed().Client(cluster.address, set_as_default=False) as client:
        loaded = client.run_on_scheduler(lambda: "workbench" in sys.modules)
    assert not loaded, "the scheduler needs no workbench"


def test_leaving_a_sweep_ends_the_kernels_on_the_workers(cluster, tmp_path):
    book = write_notebook(tmp_path / "endless.ipynb", "n = 9", NOTE, FOR_EVER)
    sweep = Sweep(book, {"n": [1, 2]}, tmp_path / "sweep", executor=cluster.address)
    for _ in sweep:
        if tries(tmp_path, 1):
            break
    assert sweep.runs[0].state == "cancelled"
    assert not psutil.pid_exists(tries(tmp_path, 1)[0][0])


def test_a_client_that_goes_takes_its_kernels_with_it(cluster, endless):
    client = load_distributed().Client(cluster.address, set_as_default=False)
    executor = on_cluster(client, endless.folder)
    outcome = executor.submit(endless)
    kernel = wait_for(lambda: tries(endless.notebook.parent, 1))[0][0]
    client.close()  # as the end of its process does
    with pytest.raises(RunError, match="the scheduler is lost"):
        outcome.result(timeout=60)
    executor.close()
    wait_for(lambda: not psutil.pid_exists(kernel), seconds=60)


def test_a_worker_with_another_workbench_is_refused_by_name(cluster, tmp_path):
    shutil.copytree(ROOT / "workbench", tmp_path / "workbench")
    with (tmp_path / "workbench" / "errors.py").open("a") as file:
        file.write("\n# changed\n")
    there = f"{tmp_path}:{paths()}"
    (worker,) = cluster.workers(1, *MLX, PYTHONPATH=there)
    with pytest.raises(ConfigError, match=r"tcp://.*the worker has workbench \w{8}, MLX .*; here"):
        on_cluster(cluster.address, tmp_path / "root")
    worker.kill()


def test_a_worker_that_does_not_share_the_folder_is_refused_by_name(cluster, tmp_path):
    own = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "none", tmp_path]).returncode:
        pytest.skip("this machine lets nobody mount a folder that others do not see")
    (worker,) = cluster.workers(1, *MLX, before=[*own, "sh", "-c", MOUNT, str(tmp_path)])
    with pytest.raises(RunError, match=r"tcp://.*does not see the sweep's folder .*root"):
        on_cluster(cluster.address, tmp_path / "root")
    worker.kill()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A scheduler that forgives no killed worker, and a worker that is not for jobs."""
    strict = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with DaskCluster(tmp_path_factory.mktemp("bare"), **strict) as made:
        made.workers(1)
        yield made


def test_without_a_worker_for_jobs_the_command_for_one_is_named(bare, tmp_path):
    command = rf'dask worker {bare.address} --resources "mlx=1" --nthreads 1'
    with pytest.raises(ConfigError, match=f"none of 1 workers declares .* {command}"):
        on_cluster(bare.address, tmp_path)


@pytest.mark.long
def test_a_job_that_kills_workers_ends_and_jobs_do_not_wait_for_ever(bare, endless, monkeypatch):
    monkeypatch.setattr(cluster_module, "PATIENCE_SECONDS", 1.0)
    (worker,) = bare.workers(1, *MLX)
    executor = on_cluster(bare.address, endless.folder)
    outcome = executor.submit(endless)
    kernel = wait_for(lambda: tries(endless.notebook.parent, 1))[0][0]
    worker.kill()
    result = outcome.result(timeout=120)
    assert (result.state, result.error) == ("killed", "1 workers died while they ran it")
    with pytest.raises(RunError, match="no worker is left that declares the resource 'mlx'"):
        executor.submit(endless).result(timeout=120)
    executor.close()
    wait_for(lambda: not psutil.pid_exists(kernel), seconds=60)


def test_a_lost_scheduler_is_named_and_leaves_no_kernel(bare, endless):
    bare.workers(1, *MLX)
    executor = on_cluster(bare.address, endless.folder)
    outcome = executor.submit(endless)
    kernel = wait_for(lambda: tries(endless.notebook.parent, 1))[0][0]
    bare.scheduler.kill()
    with pytest.raises(RunError, match=f"{bare.address}: the scheduler is lost"):
        outcome.result(timeout=60)
    with pytest.raises(RunError, match="the scheduler is lost"):
        executor.submit(endless).result()
    executor.cancel()
    executor.close()
    wait_for(lambda: not psutil.pid_exists(kernel), seconds=60)


def test_an_address_where_nobody_listens_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_connection, "CONNECT_SECONDS", 0.5)
    with pytest.raises(RunError, match=r"tcp://127.0.0.1:9: no scheduler answers there"):
        on_cluster("tcp://127.0.0.1:9", tmp_path)
    with pytest.raises(ConfigError, match="executor 'here' is none"):
        on_cluster("here", tmp_path)


def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'mlx-lora-workbench\[cluster\]'"):
        on_cluster("dask", tmp_path)


@pytest.mark.long
def test_a_trainer_goes_on_where_the_killed_worker_left_it(tmp_path):
    training = "trainer = toy_trainer(run_dir=run_dir, steps=12, checkpoint_every=2)"
    steps = "for report in trainer:\n    print(report.step, flush=True)\n    time.sleep(0.5)"
    imports = "from tests.toy_training import toy_trainer"
    cells = "n = 1\nrun_dir = ''", NOTE, imports, training, steps
    book = write_notebook(tmp_path / "train.ipynb", *cells)
    with DaskCluster(tmp_path) as made:
        made.workers(2, *MLX)
        sweep = Sweep(book, [{"n": 1}], tmp_path / "sweep", executor=made.address)
        (run,) = sweep.runs
        for _ in sweep:
            if run.progress.get("step", 0) >= 5 and len(tries(tmp_path, 1)) == 1:
                made.kill_one_of(tries(tmp_path, 1)[0])
    assert len(tries(tmp_path, 1)) == 2
    assert run.state == "finished"
    again = nbformat.read(run.folder / "notebook.ipynb", as_version=4).cells[-1].outputs
    assert int(again[0].text.split()[0]) >= 5, "the second attempt began anew"
    unbroken = [report.loss for report in toy_trainer(steps=12)]
    assert list(read_metrics(run.folder)["loss"]) == pytest.approx(unbroken, rel=1e-5)


@pytest.mark.long
def test_workers_of_this_machine_are_started_again(tmp_path):
    book = write_notebook(tmp_path / "n.ipynb", "n = 3", NOTE, DIE_OR_WAIT)
    executor = on_cluster("dask", tmp_path / "sweep", at_once=1)
    assert executor.at_once == 1
    assert executor.shares_memory
    outcome = executor.submit(Job(book, {}, tmp_path / "run"))
    kernel, _, worker, *_ = wait_for(lambda: tries(tmp_path, 3))[0]
    sockets = [*psutil.Process().net_connections(), *psutil.Process(worker).net_connections()]
    listens = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
    assert listens == {"127.0.0.1"}, "others on the network can reach this cluster"
    psutil.Process(worker).kill()
    assert outcome.result(timeout=60).state == "finished"
    executor.close()
    assert not any(psutil.pid_exists(pid) for pid in (kernel, worker, *tries(tmp_path, 3)[1][:3]))


@pytest.mark.long
def test_a_job_over_tls(tmp_path, monkeypatch):
    import dask

    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=sweep"
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make certificates with")
    cert, key = str(tmp_path / "cert"), str(tmp_path / "key")
    subprocess.run([*make.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    files = "--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key
    book = write_notebook(tmp_path / "n.ipynb", "n = 1", NOTE)
    with DaskCluster(tmp_path, "--protocol", "tls", *files) as made:
        made.workers(1, *MLX)
        assert made.address.startswith("tls://")
        monkeypatch.setattr(cluster_connection, "CONNECT_SECONDS", 2.0)
        with pytest.raises(RunError, match=f"{made.address}: no scheduler answers there"):
            on_cluster(made.address, tmp_path / "sweep")
        tls = {"ca-file": cert, "client.cert": cert, "client.key": key}
        tls = {f"distributed.comm.tls.{name}": value for name, value in tls.items()}
        with dask.config.set(tls):
            executor = on_cluster(made.address, tmp_path / "sweep")
        assert executor.submit(Job(book, {}, tmp_path / "run")).result().state == "finished"
        executor.close()
