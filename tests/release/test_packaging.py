"""What is built holds what it should, says who, which version and what it needs, and can run its own tests."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from persample.testing import start

tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read with tomllib, from Python 3.11 on")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
YAML = [".github/workflows/tests.yml", ".pre-commit-config.yaml", "CITATION.cff"]


def kept() -> list[str]:
    """What the repository holds; in a source distribution there is no git, and this is what was unpacked."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout with git")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """The names in the source distribution and in the wheel, built of a copy, for building leaves files behind."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in kept():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist, zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return [name.partition("/")[2] for name in sdist.getnames()], wheel.namelist()


def test_the_source_distribution_is_the_repository(built: tuple[list[str], list[str]]) -> None:
    assert not set(kept()) - set(built[0])
    assert not [name for name in built[0] if "__pycache__" in name or name.startswith(".venv")]


def test_the_wheel_is_the_packages(built: tuple[list[str], list[str]]) -> None:
    packages = [name for name in kept() if name.startswith(("persample/", "fngd/"))]
    info = f"persample-{start.VERSION}.dist-info/"
    assert sorted(name for name in built[1] if not name.startswith(info)) == sorted(packages)
    assert f"{info}licenses/LICENSE" in built[1]


def test_versions_agree() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == start.VERSION
    torch = next(entry for entry in PROJECT["dependencies"] if entry.startswith("torch"))
    assert f">={'.'.join(map(str, start.OLDEST_TORCH))}," in torch


def test_who_is_the_project() -> None:
    assert PROJECT["authors"] == PROJECT["maintainers"] == [{"name": "The persample authors"}]
    assert "- name: The persample authors" in (ROOT / "CITATION.cff").read_text()


def imports(path: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"persample", "fngd"}


def test_what_is_imported_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    entries = [*PROJECT["dependencies"], *extras["opacus"], *extras["demo"], *extras["bench"]]
    declared = {re.split(r"[<>=\[]", entry)[0] for entry in entries}
    names = {"sklearn": "scikit-learn", "backpack": "backpack-for-pytorch"}
    paths = [path for package in ("persample", "fngd") for path in (ROOT / package).rglob("*.py")]
    used = {names.get(name, name) for path in paths for name in imports(path)}
    assert used <= declared
    assert "typing_extensions" in used & declared


def test_hints_name_what_can_be_installed() -> None:
    """The distribution is on no index, so that `pip install persample` finds nothing, or something else."""
    pages = [path for pattern in ("*.md", "docs/**/*.md", ".github/**/*") for path in ROOT.glob(pattern)]
    folders = ("persample", "fngd", "benchmarks", "experiments")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in (*pages, *code):
        if path.is_file():
            assert not re.search(r"pip install [^\n]*persample", path.read_text()), path


@pytest.mark.parametrize("name", YAML)
def test_settings_of_services_can_be_read(name: str) -> None:
    yaml: Any = pytest.importorskip("yaml", reason="PyYAML comes with the docs extra")
    found = yaml.safe_load((ROOT / name).read_text())
    if name.endswith("tests.yml"):
        runs = [step["run"] for job in found["jobs"].values() for step in job["steps"] if "run" in step]
        targets = {target for run in runs if run.startswith("make ") for target in run.split()[1:]}
        assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        first = found["jobs"]["matrix"]["strategy"]["matrix"]["include"][0]
        assert first["torch"] == f"=={'.'.join(map(str, start.OLDEST_TORCH))}.*"
    elif name.startswith(".pre"):
        tools = {hook["entry"].split()[0] for hook in found["repos"][0]["hooks"]}
        assert tools == {".venv/bin/ruff", ".venv/bin/mypy"}
    else:
        assert found["cff-version"] == "1.2.0"
        assert found["license"] == PROJECT["license"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")), ids=lambda path: path.stem)
def test_templates_of_issues_have_a_head(path: Path) -> None:
    head = path.read_text().split("---\n")[1]
    assert re.fullmatch(r"name: .+\nabout: .+\nlabels: \[\w+\]\n", head)


def test_nothing_committed_names_a_machine_or_a_registry() -> None:
    """Neither an address of an index nor a folder of whoever wrote it."""
    words = re.compile(r"(?:index-url|extra-index|find-links)\b|/(?:home|root|Users|work|mnt)/\w")
    for name in (*YAML, "pyproject.toml", "Makefile", "constraints.txt", "MANIFEST.in", "mkdocs.yml"):
        assert not words.search((ROOT / name).read_text()), name
