"""The house keeps its plan: imports run downwards, files are short, nothing prints."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "workbench").rglob("*.py"))
FLOORS = {  # a room may import from its own floor and from those below
    "errors": 0,
    "blas": 1,
    "machine": 1,
    "blocks": 1,
    "numerics": 1,
    "backend": 2,
    "models": 3,
    "data": 3,
    "runs": 3,
    "probes": 3,
    "evaluation": 4,
    "tuning": 5,
    "export": 6,
    "live": 6,
    "benchmarks": 7,  # nobody imports it
    "doctor": 7,
    "commands": 8,  # the command line: nobody imports it, and it alone prints
    "__main__": 9,
}
PLACES = [f"{place}/" for place in (Path.home(), ROOT, ROOT.parent) if len(place.parts) > 1]
UNPORTABLE = re.compile("|".join([*map(re.escape, PLACES), "file://", r"/home/\w"]))
PRIVATE_HOST = re.compile(r"https?://(?:(?!127\.)\d+\.\d+\.\d+\.\d+|[\w.-]+\.(?:internal|local))")
INDEX_OPTION = re.compile(r"--(?:extra-)?index-url|--find-links|\[\[tool\.uv\.index|index-url\s*=")


def tree(path):
    """The module's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path):
    """The room that a module stands in."""
    return path.relative_to(ROOT / "workbench").parts[0].removesuffix(".py")


def imported_rooms(path):
    """Rooms of `workbench` that a module imports from, anywhere in it."""
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("workbench."))


def tracked_files(*patterns):
    """Files under version control; all that are there, in a copy without git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    if path == ROOT / "workbench" / "__init__.py":
        return  # the public face hands on names from everywhere
    here = room(path)
    for other in imported_rooms(path):
        assert FLOORS[other] <= FLOORS[here], f"{here} imports {other}"


def test_no_two_rooms_import_each_other():
    pairs = {(room(path), other) for path in MODULES for other in imported_rooms(path)}
    assert [(a, b) for a, b in sorted(pairs) if a < b and (b, a) in pairs] == []


def test_only_live_knows_widgets_and_charts():
    for path in MODULES:
        names = {
            name.split(".")[0]
            for node in ast.walk(tree(path))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert room(path) == "live" or not names & {"ipywidgets", "matplotlib"}, path


def test_nothing_but_the_command_line_prints():
    calls = [
        f"{path.name}:{node.lineno}"
        for path in MODULES
        if room(path) != "commands"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert calls == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(line.lineno for line in node.decorator_list)])
            assert node.end_lineno - first + 1 <= 40, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_whatever_is_public_is_documented_and_annotated(path):
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{node.name} has no return annotation"


def test_conda_and_pip_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (python,) = [entry for entry in conda if re.match(r"python\b", entry)]
    assert pip == ["-e .[dev]"]
    assert {re.split(r"[<>=]", entry)[0] for entry in conda} == {"python", "pip"}
    oldest = re.search(r"\d+\.\d+", project["requires-python"])[0].split(".")
    chosen = re.search(r"\d+\.\d+", python)[0].split(".")
    assert [int(n) for n in chosen] >= [int(n) for n in oldest]
    assert "dev" in project["optional-dependencies"]


def test_no_tracked_text_names_a_registry_or_a_path_of_one_machine():
    found = []
    for path in tracked_files():
        if path == Path(__file__).resolve() or path.suffix in {".safetensors", ".png", ".csv"}:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in (UNPORTABLE, PRIVATE_HOST, INDEX_OPTION):
            found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in pattern.finditer(text)]
    assert found == []
