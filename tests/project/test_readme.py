"""What the pages say is so: examples run as written, commands exist, links and paths lead somewhere."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matrix
import pytest

import persample
from fngd.training.recipes import OPTIMIZERS
from persample.backends import BACKENDS
from persample.rules import RULES

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / ".github").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()


def fenced(text: str, language: str) -> list[tuple[int, str]]:
    """Returns the blocks of a language in a page: (line where it begins, code)."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


EXAMPLES = [
    pytest.param(page, line, code, id=f"{page.stem}-{line}")
    for page in PAGES
    for line, code in fenced(page.read_text(), "python")
]


@pytest.fixture
def _registries_kept() -> Iterator[None]:
    """Examples may register rules, backends and optimisers; they are gone afterwards."""
    registries: list[dict[str, Any]] = [RULES, BACKENDS, OPTIMIZERS]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.usefixtures("_registries_kept")
@pytest.mark.parametrize(("page", "line", "code"), EXAMPLES)
def test_example_runs(page: Path, line: int, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    for comment in re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE):
        for shape in re.findall(r"\[[\d, ]+\]", comment):
            assert shape in printed, f"{page.name}: the comment {comment!r} promises {shape}"


def test_examples_are_found() -> None:
    assert {page.stem for page, _, _ in (example.values for example in EXAMPLES)} >= {"README", "architecture"}
    assert len(EXAMPLES) >= 7


def test_readme_examples_are_short() -> None:
    for _, code in fenced(README, "python"):
        assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_readme_examples_need_no_extra() -> None:
    brought = {"torch", "einops", "numpy", "persample", "fngd"}
    for _, code in fenced(README, "python"):
        nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
        assert {name.partition(".")[0] for name in names} <= brought


def test_totals_are_those_of_the_conformance_page() -> None:
    def rows(text: str) -> list[str]:
        begin = text.index("| of ")
        return text[begin : text.index("\n\n", begin)].splitlines()

    page = (ROOT / "docs" / "conformance.md").read_text()
    assert rows(README) == rows(page)
    assert rows(page)[0].startswith(f"| of {len(re.findall(r'^[|] `.*[✓·✗]', page, re.MULTILINE))} cases")


def test_the_table_of_versions_is_what_was_run() -> None:
    table = README.partition("<!-- versions: begin -->\n")[2].partition("\n<!-- versions: end -->")[0]
    assert table == matrix.table(matrix.kept())


# --- commands, tables and links -----------------------------------------------------------------------------


def commands() -> list[str]:
    """Returns every `python -m …` line of the README's console blocks, without its comment."""
    lines = [line for _, block in fenced(README, "console") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("python -m")]


@pytest.mark.parametrize("command", commands())
def test_command_knows_its_options(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, module, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, words[0], "--help"])
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)  # another test may have run it
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"{module}.__main__", run_name="__main__")
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    assert not {word for word in words if word.startswith("--") and word not in shown.out}


def test_commands_start() -> None:
    """In a process of their own, as one types them; both in one, as most of the time is torch's."""
    code = "\n".join(
        f"try: runpy.run_module({module!r}, run_name='__main__')\nexcept SystemExit as ended: assert ended.code == 0"
        for module in ("persample", "fngd")
    )
    command = [sys.executable, "-c", f"import runpy, sys\nsys.argv[1:] = ['--help']\n{code}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage:") == 2


def test_readme_names_the_commands() -> None:
    named = {" ".join(shlex.split(command)[2:4]) for command in commands()}
    assert named == {"persample compare", "persample conformance", "persample report", "fngd compare", "fngd demo"}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        mentioned = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert mentioned <= targets, page.name


def test_backend_table_is_the_registry() -> None:
    table = README.partition("## Backends")[2].partition("##")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == persample.backends()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(found.read_text()), f"{page.name} links to #{anchor}, which is not there"
    for path in re.findall(r"`((?:persample|fngd|tests|docs)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_names_every_folder() -> None:
    named = set(re.findall(r"`((?:persample|fngd)/[\w/]+)/`", (ROOT / "docs" / "map.md").read_text()))
    there = {
        str(path.parent.relative_to(ROOT))
        for package in ("persample", "fngd")
        for path in (ROOT / package).glob("*/**/__init__.py")
    }
    assert {folder for folder in there if "/cases" not in folder} == named
