"""The packages are rooms on floors: imports go downward, no folder is too full, and what is public says so."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "persample": (
        "__main__ testing opacus reweighting result projections backends capture rules attribution graph blocks "
        "memory errors"
    ),
    "fngd": "__main__ demo training data_influence natural shampoo kronecker least_squares optim coefficients",
}
"""From the top: each imports from those below it, and from itself."""
PUBLIC = (
    *("persample", "persample.attribution", "persample.backends", "persample.blocks"),
    *("persample.memory", "persample.opacus", "persample.projections", "persample.reweighting", "persample.rules"),
    "persample.testing.cases",
    *("fngd", "fngd.least_squares", "fngd.training"),
)
MOST_ENTRIES = 14
MOST_LINES = 350


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for package in FLOORS for path in sorted((ROOT / package).rglob("*.py"))}


def imported(code: str) -> Iterator[str]:
    """What code imports of the packages: modules where they are some, else `module.name`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{each.name}" for each in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in FLOORS)


def module_of(name: str) -> str:
    return name if name in MODULES else name.rpartition(".")[0]


ARROWS = {
    module: {module_of(name) for name in imported(path.read_text())} - {module} for module, path in MODULES.items()
}


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    floors = FLOORS[package].split()
    there = {path.stem for path in (ROOT / package).iterdir() if (path.is_dir() or path.suffix == ".py")}
    assert there - {"__init__", "__pycache__"} == set(floors)
    height = {f"{package}.{room}": -floor for floor, room in enumerate(floors)}

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    upward = [
        f"{module} imports {other}"
        for module, others in ARROWS.items()
        for other in others
        if room(module) in height and height.get(room(other), -len(floors)) > height[room(module)]
    ]
    assert not upward, "\n".join(upward)


def test_imports_go_in_no_circle() -> None:
    """Doors aside: a folder's `__init__` hands on names that its own files define, and imports no other room."""
    doors = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    TopologicalSorter({module: others - doors for module, others in ARROWS.items() if module not in doors}).prepare()


def test_fngd_uses_the_doors_of_persample() -> None:
    allowed = {"persample", "persample.reweighting"}
    for module, others in ARROWS.items():
        commands = module.startswith(("fngd.training", "fngd.__main__"))
        more = (
            {"persample.testing.command_line", "persample.testing.start"} if commands else {"persample.testing.start"}
        )
        there = {other for other in others if other.startswith("persample")}
        if module.startswith("fngd.demo"):  # it compares as `python -m persample compare` and `conformance` do
            there = {other for other in there if not other.startswith("persample.testing.")}
        assert not module.startswith("fngd") or there <= allowed | more, module


FOLDERS = [ROOT / package for package in FLOORS]
FOLDERS += [path for top in FOLDERS for path in top.rglob("*") if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_folder_is_too_full(folder: Path) -> None:
    entries = [each for each in folder.iterdir() if each.name not in ("__init__.py", "__pycache__", "py.typed")]
    assert len(entries) <= MOST_ENTRIES


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long_and_each_says_what_it_is(module: str) -> None:
    code = MODULES[module].read_text()
    assert len(code.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(code))


def pages() -> Iterator[tuple[str, str]]:
    """The code of documentation and notebooks."""
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]):
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            blocks = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        else:
            blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
        yield from ((path.name, block) for block in blocks)


def test_pages_import_what_is_public() -> None:
    for page, code in pages():
        statements = "\n".join(re.findall(r"^(?:from|import) (?:[^(\n]*\n|[^(\n]*\([^)]*\)\n?)", code, re.MULTILINE))
        for name in imported(statements):
            owner, _, attribute = name.rpartition(".")
            assert name in PUBLIC or (owner in PUBLIC and attribute in import_module(owner).__all__), f"{page}: {name}"


def test_public_rooms_are_documented() -> None:
    page = (ROOT / "docs" / "map.md").read_text()
    for room in PUBLIC:
        assert f"`{room}`" in page


def test_benchmarks_and_experiments_are_apart() -> None:
    for package, other in (("benchmarks", "experiments"), ("experiments", "benchmarks")):
        for path in (ROOT / package).glob("*.py"):
            assert not re.search(rf"^\s*(from|import) {other}\b", path.read_text(), re.MULTILINE), path
