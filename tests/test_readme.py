"""What the documents say is so: examples run as written, commands exist, links lead somewhere, names are documented."""

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fngd
import persample
from fngd.recipes import OPTIMIZERS
from persample.backends import BACKENDS
from persample.rules import RULES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
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


# --- commands, tables and links -----------------------------------------------------------------------------


def commands() -> list[str]:
    """Returns every `python -m …` line of the README's console blocks, without its comment."""
    lines = [line for _, block in fenced(README, "console") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("python -m")]


@pytest.mark.parametrize("command", commands())
def test_command_knows_its_options(command: str) -> None:
    words = shlex.split(command)
    options = {word for word in words if word.startswith("--")}
    run = subprocess.run(
        [sys.executable, *words[1:4], "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert not {option for option in options if option not in run.stdout}


def test_readme_names_the_commands() -> None:
    named = {" ".join(shlex.split(command)[2:4]) for command in commands()}
    assert named == {"persample compare", "persample conformance", "fngd compare"}


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


# --- docstrings ---------------------------------------------------------------------------------------------


def public() -> list[Any]:
    """Returns (name, object) of everything public in both packages: exports, and the exported classes' own methods."""
    found = []
    for package in (persample, fngd):
        for name in package.__all__:
            thing = getattr(package, name)
            found.append(pytest.param(thing, id=f"{package.__name__}.{name}"))
            if inspect.isclass(thing):
                members = ((n, m) for kind in thing.__mro__ if own(kind) for n, m in vars(kind).items())
                found += [
                    pytest.param(member, id=f"{package.__name__}.{name}.{own_name}")
                    for own_name, member in dict(members).items()
                    if not own_name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
                ]
    return found


def own(kind: type) -> bool:
    """Whether a class is ours."""
    return kind.__module__.partition(".")[0] in ("persample", "fngd")


@pytest.mark.parametrize("thing", public())
def test_public_name_is_documented(thing: Any) -> None:
    text = inspect.getdoc(thing)
    assert text, "no docstring"
    first = text.partition("\n\n")[0]
    assert first.endswith((".", ":")), "the first paragraph is a sentence"
    if inspect.isfunction(thing) and inspect.signature(thing).return_annotation not in (None, "None"):
        assert re.search(r"\b[Rr]eturns\b", first), f"the first sentence does not say what is returned: {first!r}"


def documented() -> list[Any]:
    """Returns every docstring in both packages that has examples, with the globals of its module.

    By hand, because doctest's own finder skips functions that a decorator (jaxtyping's, in the tests) has wrapped.
    """
    found = []
    for package in (persample, fngd):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                module = importlib.import_module(info.name)
                named = {f"{info.name}.{name}".removesuffix("."): text for name, text in docstrings(module)}
                found += [pytest.param(module, text, id=name) for name, text in named.items() if ">>>" in text]
    return found


def docstrings(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yields (name, docstring) of a module, its functions and classes, and their methods."""
    yield "", module.__doc__ or ""
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        yield name, getattr(thing, "__doc__", None) or ""
        if inspect.isclass(thing):
            yield from ((f"{name}.{n}", getattr(m, "__doc__", None) or "") for n, m in vars(thing).items())


@pytest.mark.parametrize(("module", "text"), documented())
def test_doctest(module: ModuleType, text: str) -> None:
    # What an example may take for granted, beside the names of its own module.
    given = {"torch": torch, "nn": nn, "persample": persample, "fngd": fngd, **vars(module)}
    test = doctest.DocTestParser().get_doctest(textwrap.dedent(text), given, module.__name__, module.__file__, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        runner.run(test, out=report.write)
    assert test.examples
    assert not runner.failures, report.getvalue()


def test_public_functions_have_examples() -> None:
    for thing in (persample.per_sample, persample.grad, persample.reweight, fngd.FNGD, fngd.NGD, fngd.smw_coefficients):
        assert ">>>" in (thing.__doc__ or ""), thing
