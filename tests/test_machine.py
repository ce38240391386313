"""Memory of the machine: of the container where there is one, and nothing where it is not told."""

import psutil
import pytest

from workbench import machine
from workbench.backend import default_cache_limit, describe_backend
from workbench.machine import machine_memory, process_memory
from workbench.probes.memory import read_memory

GIGA = 10**9


def write_v2(root, limit, used, inactive=0):
    (root / "memory.max").write_text(f"{limit}\n")
    (root / "memory.current").write_text(f"{used}\n")
    (root / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def write_v1(root, limit, used, inactive=0):
    folder = root / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"total_inactive_file {inactive}\n")


def test_machine_has_more_than_is_available_and_the_process_a_part_of_it():
    memory = machine_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert 0 < process_memory() < memory.total_bytes


@pytest.mark.parametrize("write", [write_v1, write_v2])
def test_a_containers_limit_counts(write, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    write(tmp_path, limit=2 * GIGA, used=GIGA, inactive=GIGA // 4)
    memory = machine_memory()
    assert memory.total_bytes == 2 * GIGA
    assert memory.available_bytes == GIGA + GIGA // 4  # file pages are given back


@pytest.mark.parametrize("write", [write_v1, write_v2])
def test_a_container_that_is_over_its_limit_has_nothing_left(write, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    write(tmp_path, limit=GIGA, used=2 * GIGA)
    assert machine_memory().available_bytes == 0


@pytest.mark.parametrize(
    ("write", "limit"), [(write_v2, "max"), (write_v1, 2**63 - 4096), (write_v2, "nonsense")]
)
def test_a_container_without_a_limit_has_the_machines(write, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    write(tmp_path, limit=limit, used=GIGA)
    assert machine_memory().total_bytes == psutil.virtual_memory().total


def test_missing_counters_are_none_and_break_nothing(monkeypatch):
    def refuse(*_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(psutil, "Process", refuse)
    assert machine_memory() is None
    assert process_memory() is None
    assert read_memory().available_bytes is None
    assert read_memory().active_bytes >= 0
    assert default_cache_limit() > 0
    assert "not known" in str(describe_backend())
