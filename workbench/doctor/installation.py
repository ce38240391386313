"""Are the Python and the packages here those that pyproject.toml asks for?"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from workbench.doctor.records import ABSENT, FAILS, OK, WARNING, Record, Settings

PROJECT = "mlx-lora-workbench"
NOT_INSTALLED = "the workbench is imported from a folder, and not installed"
INSTALL = 'In the folder that has pyproject.toml: pip install -e ".[{extra}]".'
BROWSERS = ("chromium", "chromium-browser")


def check_python(settings: Settings) -> Record:
    """The interpreter's version against `requires-python`."""
    version = platform.python_version()
    try:
        wanted = importlib.metadata.metadata(PROJECT)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return Record("Python", WARNING, f"{version}; {NOT_INSTALLED}", _install("dev"))
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Record("Python", FAILS, f"{version}, needed {wanted}", "Install a newer Python.")
    return Record("Python", OK, f"{version}, needed {wanted}")


def check_packages(settings: Settings) -> Record:
    """Every package that is always needed, in the versions that pyproject.toml allows."""
    try:
        needed = _requirements(PROJECT, "")
    except importlib.metadata.PackageNotFoundError:
        return Record("packages", WARNING, NOT_INSTALLED, _install("dev"))
    lacking = [fault for requirement in needed for fault in _faults(requirement)]
    if lacking:
        return Record("packages", FAILS, "; ".join(lacking), _install("dev"))
    shown = ("mlx", "mlx-lm", "transformers", "jupyterlab", "papermill")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown)
    return Record("packages", OK, f"all {len(needed)} in their ranges; {versions}")


def check_extras(settings: Settings) -> Record:
    """Which of pyproject.toml's extras are wholly here."""
    try:
        extras = importlib.metadata.metadata(PROJECT).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return Record("extras", WARNING, NOT_INSTALLED, _install("dev"))
    lacking = {}
    for extra in extras:
        needed = _requirements(PROJECT, extra)
        faults = [fault for requirement in needed for fault in _faults(requirement)]
        if faults or not needed:  # an extra of another system needs nothing here
            lacking[extra] = faults
    here = [extra for extra in extras if extra not in lacking]
    seen = f"{', '.join(here) or 'none'} here"
    missing = "; ".join(
        f"{extra}: {', '.join(faults)}" for extra, faults in lacking.items() if faults
    )
    if not missing:
        return Record("extras", OK, seen)
    return Record(
        "extras", ABSENT, f"{seen}; {missing}", f"Where you want one. {_install('EXTRA')}"
    )


def check_browser(settings: Settings) -> Record:
    """Chromium, which only the tests of the live panel need."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        seen = "no Chromium; only `make test-browser` needs it"
        return Record("browser", ABSENT, seen, "Linux: apt-get install chromium.")
    return Record("browser", OK, path)


def _install(extra: str) -> str:
    return INSTALL.format(extra=extra)


def _requirements(project: str, extra: str) -> list[Requirement]:
    """What a project needs on this system: always, or, of an extra, for that alone."""
    found = []
    for line in importlib.metadata.requires(project) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else not always and marker.evaluate({"extra": extra}):
            found.append(requirement)
    return found


def _faults(requirement: Requirement) -> Iterator[str]:
    """What is missing for a requirement and for the extras that it names."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        yield f"no {requirement.name}"
        return
    if not requirement.specifier.contains(version, prereleases=True):
        yield f"{requirement.name} is {version}, needed {requirement.specifier}"
    for extra in sorted(requirement.extras):
        for part in _requirements(requirement.name, extra):
            yield from _faults(part)
