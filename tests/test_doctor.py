"""The doctor: all is well here, and each thing that is broken is named with its cure."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import psutil
import pytest

from workbench.blas import cache_folder
from workbench.commands.doctor import CHECKS
from workbench.doctor import training
from workbench.doctor.installation import (
    PROJECT,
    check_browser,
    check_extras,
    check_packages,
    check_python,
)
from workbench.doctor.jupyter import MANAGER, check_kernel, check_papermill, check_widgets
from workbench.doctor.machine import MODEL, check_cache, check_device, check_memory, check_model
from workbench.doctor.records import (
    ABSENT,
    ERROR_CUT,
    FAILS,
    OK,
    WARNING,
    Record,
    Settings,
    examine,
)
from workbench.errors import ConfigError
from workbench.models.sources import PACKAGED_MODELS

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^(ok|warning|fails|absent) +(\w+) ", re.M)


def doctor(*options, **env):
    """Exit status, state by name, and all that a doctor in a process of its own wrote."""
    command = [sys.executable, "-m", "workbench", "doctor", *options]
    merged = {**os.environ, **{name: str(value) for name, value in env.items()}}
    done = subprocess.run(command, cwd=ROOT, env=merged, capture_output=True, text=True)
    states = {name: state for state, name in LINE.findall(done.stdout)}
    return done.returncode, states, done.stdout, done.stderr


def kernel_spec(folder, name, argv, **more):
    """A folder for JUPYTER_PATH with one kernel spec."""
    place = folder / "kernels" / name
    place.mkdir(parents=True)
    spec = {"argv": argv, "display_name": name, "language": "python", **more}
    (place / "kernel.json").write_text(json.dumps(spec))
    return folder


def put_metadata(folder, name, version, *lines):
    """Metadata of an installed package."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (place / "METADATA").write_text("\n".join([*head, *lines]) + "\n")


def test_what_works_here_is_said_and_nothing_fails():
    code, states, out, err = doctor()
    assert list(states) == [name for name, _ in CHECKS]
    assert FAILS not in states.values(), out
    assert {states[name] for name in ("cache", "training", "kernel", "papermill")} == {OK}
    assert (code, err) == (0, "")
    assert re.search(rf"\n{len(CHECKS)} checks in \d+ s: .*{OK}", out)


@pytest.mark.long
def test_what_is_broken_is_said_and_the_exit_status_is_1(tmp_path):
    (tmp_path / "file").touch()
    specs = kernel_spec(tmp_path / "jupyter", "python3", ["false"])
    broken = {"WORKBENCH_CACHE": tmp_path / "file", "JUPYTER_PATH": specs}
    code, states, out, err = doctor("--disk-gb", "1e9", "--memory-gb", "1e9", **broken)
    failing = {name for name, state in states.items() if state == FAILS}
    assert failing == {"disk", "cache", "kernel", "papermill"}, out
    assert (states["memory"], states["model"]) == (WARNING, WARNING)
    assert "Set WORKBENCH_CACHE to a folder" in out
    assert "Traceback" not in out + err
    assert code == 1


def test_a_check_that_raises_is_a_failure_with_the_errors_text():
    def broken(settings):
        raise RuntimeError("no\nluck \x1b[31m" + "x" * 1000)

    def refused(settings):
        raise ConfigError("is wrong", where="there", cure="Do this.")

    checks = [("one", broken), ("two", refused), ("three", lambda s: Record("three", OK, "3"))]
    one, two, three = examine(checks, Settings())
    assert (one.name, one.state) == ("one", FAILS)
    assert one.seen.startswith("RuntimeError: no luck \x1b[31mxxx")
    assert len(one.seen) == ERROR_CUT + 1
    assert "\\x1b[31mxxx" in str(one)
    assert "\x1b" not in str(one)
    assert two == Record("two", FAILS, "there: is wrong", "Do this.")
    assert three.state == OK


def test_a_record_is_shown_in_columns_with_its_cure_below():
    shown = str(Record("kernel", FAILS, "words " * 40, "cure " * 40)).splitlines()
    assert shown[0].startswith("fails    kernel      words")
    assert {line[:21].strip() for line in shown[1:]} == {""}
    assert [line.strip()[0] for line in shown].count("→") == 1
    assert max(map(len, shown)) <= 100


def test_an_unknown_kernel_is_named_with_those_that_are_there():
    record = check_kernel(Settings(kernel="elsewhere"))
    assert record.state == FAILS
    assert "no kernel 'elsewhere'; there are " in record.seen
    assert "python3" in record.seen
    assert record.cure.endswith("--name elsewhere")


def test_a_kernel_of_another_python_is_noticed(tmp_path, monkeypatch):
    venv.create(tmp_path / "other", with_pip=False)
    other = str(tmp_path / "other" / "bin" / "python")
    site = next(path for path in sys.path if path.endswith("site-packages"))
    argv = [other, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specs = kernel_spec(tmp_path / "jupyter", "other", argv, env={"PYTHONPATH": site})
    monkeypatch.setenv("JUPYTER_PATH", str(specs))
    record = check_kernel(Settings(kernel="other"))
    assert record.state == WARNING
    assert f"the Python in '{tmp_path / 'other'}'" in record.seen
    assert str(specs) in record.cure


def test_a_kernel_that_finds_another_workbench_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "workbench").mkdir()
    (tmp_path / "workbench" / "__init__.py").touch()
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specs = kernel_spec(tmp_path, "changed", argv, env={"PYTHONPATH": str(tmp_path)})
    monkeypatch.setenv("JUPYTER_PATH", str(specs))
    record = check_kernel(Settings(kernel="changed"))
    assert record.state == WARNING
    assert str(tmp_path / "workbench") in record.seen
    assert "pip install -e" in record.cure


def test_a_kernel_that_hangs_is_given_up_and_ended(tmp_path, monkeypatch):
    argv = [sys.executable, "-c", "import time; time.sleep(600)", "{connection_file}"]
    monkeypatch.setenv("JUPYTER_PATH", str(kernel_spec(tmp_path, "hangs", argv)))
    started = time.monotonic()
    (record,) = examine([("kernel", check_kernel)], Settings(kernel="hangs", kernel_seconds=1))
    assert (record.state, record.name) == (FAILS, "kernel")
    assert "in 1" in record.seen
    assert time.monotonic() - started < 30
    assert not [p for p in psutil.Process().children() if "time.sleep(600)" in p.cmdline()]


def test_papermill_without_its_kernel_is_a_failure():
    (record,) = examine([("papermill", check_papermill)], Settings(kernel="elsewhere"))
    assert record.state == FAILS
    assert "elsewhere" in record.seen


def test_widgets_that_are_switched_off_are_noticed(tmp_path, monkeypatch):
    config = tmp_path / "labconfig"
    config.mkdir()
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path))
    for plugin in (MANAGER, f"{MANAGER}:plugin"):
        page = json.dumps({"disabledExtensions": {plugin: True}})
        (config / "page_config.json").write_text(page)
        record = check_widgets(Settings())
        assert (record.state, record.cure) == (FAILS, f"jupyter labextension enable {plugin}")
    (config / "page_config.json").unlink()
    assert check_widgets(Settings()).state == OK


@pytest.mark.parametrize("place", ["file", "/proc/workbench", "/proc"])
def test_a_cache_folder_that_cannot_be_written_to_is_named(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / place))
    record = check_cache(Settings())
    assert record.state == FAILS
    assert str(tmp_path / place) in record.seen
    assert "WORKBENCH_CACHE" in record.cure


def test_the_doctor_leaves_nothing_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "new"))
    assert check_cache(Settings()).state == OK
    assert list((tmp_path / "new").iterdir()) == []


def test_a_model_that_is_not_there_or_damaged_is_a_warning(tmp_path, monkeypatch):
    model = PACKAGED_MODELS[MODEL]
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    record = check_model(Settings())
    assert (record.state, "98 MB" in record.cure) == (WARNING, True)
    assert list(tmp_path.iterdir()) == []  # asking fetches nothing
    place = tmp_path / "models" / f"{model.package}-{model.version}" / model.file_name
    place.parent.mkdir(parents=True)
    with place.open("wb") as file:
        file.truncate(model.size_bytes)
    assert check_model(Settings()).state == WARNING


def test_the_model_is_fetched_where_that_is_asked_for(smollm2, tmp_path, monkeypatch):
    cached = cache_folder() / "models"
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    (tmp_path / "models").symlink_to(cached)
    assert check_model(Settings(fetch=True)).state == OK
    (tmp_path / "models").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip finds nothing
    (record,) = examine([("model", check_model)], Settings(fetch=True))
    assert record.state == FAILS
    assert "pip cannot fetch it" in record.seen


def test_too_little_memory_is_a_warning():
    assert check_memory(Settings(memory_bytes=0)).state == OK
    record = check_memory(Settings(memory_bytes=1e18))
    assert (record.state, "end other programs" in record.cure) == (WARNING, True)


def test_the_device_is_told_with_its_blas_and_speed():
    record = check_device(Settings())
    assert record.state in (OK, WARNING)  # beside other work a product may be slow
    assert re.search(r"\d+ cores; .* \d+ GFLOP/s", record.seen)


def test_packages_out_of_their_ranges_are_named(tmp_path, monkeypatch):
    assert check_packages(Settings()).state == OK
    put_metadata(tmp_path, "mlx-lm", "0.1")
    monkeypatch.syspath_prepend(tmp_path)
    record = check_packages(Settings())
    assert record.state == FAILS
    assert re.fullmatch(r"mlx-lm is 0\.1, needed [\d.,<>=]+", record.seen)


def test_missing_packages_extras_and_an_old_python_are_named(tmp_path, monkeypatch):
    lines = [
        "Requires-Python: >=9",
        "Requires-Dist: numpy",
        "Requires-Dist: not-there-one>=1",
        'Requires-Dist: not-there-two; sys_platform == "never"',
        "Provides-Extra: whole",
        'Requires-Dist: numpy; extra == "whole"',
        "Provides-Extra: part",
        f'Requires-Dist: {PROJECT}[inner]; extra == "part"',
        "Provides-Extra: inner",
        'Requires-Dist: not-there-three; extra == "inner"',
        "Provides-Extra: foreign",
        'Requires-Dist: not-there-four; sys_platform == "never" and extra == "foreign"',
    ]
    put_metadata(tmp_path, PROJECT, "0.1.0", *lines)
    monkeypatch.syspath_prepend(tmp_path)
    assert check_python(Settings()).state == FAILS
    packages, extras = check_packages(Settings()), check_extras(Settings())
    assert (packages.state, packages.seen) == (FAILS, "no not-there-one")
    told = "whole here; part: no not-there-three; inner: no not-there-three"
    assert (extras.state, extras.seen) == (ABSENT, told)


def test_a_workbench_that_is_not_installed_is_a_warning(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # where metadata of packages is looked for
    records = [check(Settings()) for check in (check_python, check_packages, check_extras)]
    assert {record.state for record in records} == {WARNING}
    assert all("not installed" in record.seen for record in records)


def test_a_missing_browser_is_optional(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_browser(Settings()).state == ABSENT
    chromium = tmp_path / "chromium"
    shutil.copy(shutil.which("true", path=os.defpath), chromium)
    assert check_browser(Settings()) == Record("browser", OK, str(chromium))


def test_training_that_does_not_move_the_adapter_is_a_failure(monkeypatch):
    assert training.check_training(Settings()).state == OK
    monkeypatch.setattr(training, "STEPS", 1)  # too few for lora_a to move
    record = training.check_training(Settings())
    assert (record.state, "lora_a" in record.seen) == (FAILS, True)
