"""A client of a dask.distributed cluster, and whether its workers fit a sweep."""

from __future__ import annotations

import contextlib
import importlib
import logging
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from workbench.errors import ConfigError, RunError, check_whole
from workbench.runs.cluster_workers import Surroundings, make_look
from workbench.runs.commits import STAGING

RESOURCE = "mlx"
CONNECT_SECONDS = 10.0


def load_distributed() -> ModuleType:
    """The package dask.distributed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise ConfigError(
            f"an executor on a cluster needs dask.distributed ({error})",
            cure="Install the extra: pip install 'mlx-lora-workbench[cluster]'.",
        ) from None


def connect(executor: object, at_once: int, made: contextlib.ExitStack) -> object:
    """A client of a scheduler.

    Args:
        executor: a `distributed.Client`, a scheduler's address, or `dask`.
        at_once: workers that `dask` starts.
        made: what is made for the client is put onto this stack.

    Raises:
        ConfigError: dask.distributed is not installed; or the executor is none.
        RunError: the scheduler does not answer.
    """
    distributed = load_distributed()
    if isinstance(executor, distributed.Client):
        if executor.asynchronous:
            raise ConfigError("the Client is asynchronous", cure="Use Client(asynchronous=False).")
        return executor
    if executor == "dask":
        executor = made.enter_context(_local_cluster(distributed, at_once))
    elif not isinstance(executor, str) or "://" not in executor:
        raise ConfigError(
            f"executor {executor!r} is none",
            cure="Give a distributed.Client, a scheduler's address such as tcp://host:8786, or "
            "'dask' for workers on this machine.",
        )
    try:
        client = distributed.Client(executor, timeout=CONNECT_SECONDS, set_as_default=False)
        return made.enter_context(client)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise RunError(
            f"no scheduler answers there ({error})",
            where=executor,
            cure="Start one: dask scheduler. For tls:// see workbench/runs/cluster.py.",
        ) from None


def _local_cluster(distributed: ModuleType, at_once: int) -> object:
    """Workers on this machine, each a process; one that dies is started again."""
    check_whole("at_once", at_once, 1)
    return distributed.LocalCluster(
        n_workers=at_once,
        threads_per_worker=1,
        resources={RESOURCE: 1},
        memory_limit=None,  # the sweep counts memory; a worker itself needs little
        dashboard_address="127.0.0.1:0",  # any free port; dask's own may be taken
        silence_logs=logging.CRITICAL,
    )


def scheduler_address(client: object) -> str:
    """Where the scheduler is: `tcp://10.0.0.1:8786`."""
    return client.scheduler.address if client.scheduler else "dask"


def how_to_start(address: str) -> str:
    """The cure where workers are missing."""
    return f'Start some with: dask worker {address} --resources "{RESOURCE}=1" --nthreads 1'


def find_slots(client: object, *, required: bool = True) -> dict[str, int]:
    """Jobs that each worker runs at once, by its address.

    Raises:
        ConfigError: no worker declares the resource, and one is `required`.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"]
    most = {
        address: min(int(worker["resources"].get(RESOURCE, 0)), worker["nthreads"])
        for address, worker in workers.items()
    }
    slots = {address: number for address, number in most.items() if number > 0}
    if required and not slots:
        raise ConfigError(
            f"none of {len(workers)} workers declares the resource {RESOURCE!r}",
            where=scheduler_address(client),
            cure=f"{how_to_start(scheduler_address(client))}.",
        )
    return slots


def check_workers(client: object, workers: list[str], folder: Path) -> dict[str, Surroundings]:
    """What each worker sees.

    Raises:
        ConfigError: one has no workbench, or another.
        RunError: one does not see the folder, or cannot write there.
    """
    token, look, seen = secrets.token_hex(16), make_look(), {}
    with _marker(folder, token) as marker:
        here = Surroundings(**look(str(marker)))
        found = client.run(look, str(marker), workers=workers)
    for address, fields in found.items():
        seen[address] = worker = Surroundings(**fields)
        if worker.version != here.version:
            raise ConfigError(
                f"the worker has workbench {worker.version or '(none)'}; here it is {here.version}",
                where=address,
                cure="Install the same on all machines, and start the workers again.",
            )
        if worker.token != token or not worker.writable:
            what = "cannot write to" if worker.token == token else "does not see"
            raise RunError(
                f"the worker on {worker.machine} {what} the sweep's folder {folder}",
                where=address,
                cure="Give a root in a folder that all machines share under the same path.",
            )
    return seen


@contextlib.contextmanager
def _marker(folder: Path, token: str) -> Iterator[Path]:
    """A file in the folder that holds the token."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=STAGING)
        with open(handle, "w", encoding="ascii") as file:
            file.write(token)
    except OSError as error:
        raise RunError(f"cannot be used for a sweep ({error.strerror})", where=folder) from None
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
