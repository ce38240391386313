"""The BLAS is chosen before MLX is imported, loudly if that goes wrong; backend.py describes it."""

import ctypes.util
import dataclasses
import sys

import mlx.core as mx
import numpy as np
import pytest

import workbench as wb
from tests.process import finish, run, start
from workbench.blas import Blas, load_blas

BLAS_ALONE = """
import sys, types
sys.modules["workbench"] = types.ModuleType("workbench")  # not its second of other imports
sys.modules["workbench"].__path__ = ["workbench"]
from workbench.blas import load_blas
"""
SHOW_BLAS = f"""{BLAS_ALONE}
blas = load_blas()
print(blas.name, blas.source, blas.path, sep="|")
"""
CLEAN = {"WORKBENCH_BLAS": None, "CONDA_PREFIX": None}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")


@linux_only
def test_a_wrong_workbench_blas_raises_and_is_named():
    result = run("import workbench", WORKBENCH_BLAS="/nowhere/libblas.so")
    assert result.code != 0
    assert "ConfigError: WORKBENCH_BLAS" in result.err
    assert "/nowhere/libblas.so" in result.err


@linux_only
def test_a_library_that_is_no_blas_is_refused():
    result = run("import workbench", WORKBENCH_BLAS=ctypes.util.find_library("m"))
    assert "ConfigError: WORKBENCH_BLAS" in result.err
    assert "cblas_sgemm" in result.err


@linux_only
def test_mlx_imported_first_warns_with_the_cure():
    result = run("import mlx.core\nimport workbench")
    assert result.code == 0
    assert "BackendWarning" in result.err
    assert "import workbench first" in result.err


@linux_only
def test_workbench_imported_first_does_not_warn():
    result = run("import workbench", **CLEAN)
    assert (result.code, result.err) == (0, "")


@linux_only
def test_workbench_blas_comes_before_every_other(tmp_path):
    ours = load_blas().path
    name, source, path = run(SHOW_BLAS, WORKBENCH_BLAS=ours, WORKBENCH_CACHE=tmp_path).out.split(
        "|"
    )
    assert (source, path) == ("WORKBENCH_BLAS", ours)
    assert name == load_blas().name
    assert not list(tmp_path.iterdir())


@linux_only
def test_a_damaged_cached_library_is_rebuilt(tmp_path):
    run(SHOW_BLAS, **CLEAN, WORKBENCH_CACHE=tmp_path)
    (library,) = tmp_path.glob("blas/*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    result = run(SHOW_BLAS, **CLEAN, WORKBENCH_CACHE=tmp_path)
    assert result.out.startswith("OpenBLAS")
    assert library.read_bytes() == whole


@linux_only
def test_two_processes_on_an_empty_cache_both_get_openblas(tmp_path):
    processes = [start(SHOW_BLAS, **CLEAN, WORKBENCH_CACHE=tmp_path) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert all(result.out.startswith("OpenBLAS") for result in results), results
    assert not list(tmp_path.glob("blas/.tmp-*"))


@linux_only
def test_a_cache_that_cannot_be_written_is_named_in_the_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    no_system_blas = "import ctypes.util; ctypes.util.find_library = lambda name: 'libnothere.so'"
    result = run(f"{no_system_blas}\n{SHOW_BLAS}", **CLEAN, WORKBENCH_CACHE=tmp_path / "file")
    assert result.code == 0
    assert "BackendWarning" in result.err
    assert str(tmp_path / "file") in result.err


def test_matmul_equals_numpy():
    a, b = (np.random.default_rng(seed).standard_normal((200, 200)) for seed in (1, 2))
    product = mx.array(a.astype(np.float32)) @ mx.array(b.astype(np.float32))
    np.testing.assert_allclose(np.array(product), a @ b, rtol=1e-4, atol=1e-4)


def test_describe_backend_shows_device_blas_speed_memory_and_versions():
    backend = wb.describe_backend()
    text = str(backend)
    for wanted in (backend.blas.name, "GFLOP/s measured", "GB free of", mx.__version__):
        assert wanted in text
    assert 0 < backend.available_bytes <= backend.total_bytes
    assert backend.float32_gflops > 0


def test_the_html_of_the_backend_is_escaped():
    hostile = Blas("<script>x</script>", "a & b", warning="<b>slow</b>")
    page = dataclasses.replace(wb.describe_backend(), blas=hostile)._repr_html_()
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page
    assert "<script>" not in page
    assert "<b>" not in page
