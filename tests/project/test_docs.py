"""The documentation: every public name has an example that runs and a place in the reference, and the site builds."""

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fngd
import persample
import persample.opacus

ROOT = Path(__file__).parents[2]
PACKAGES = (persample, fngd)
ROOMS = (persample, persample.opacus, persample.projections, fngd, fngd.least_squares)
"""Whose names the reference explains, on the page of their package."""
needs_docs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="needs mkdocs and mkdocstrings: pip install -c constraints.txt -e '.[docs]'",
)


def public() -> list[Any]:
    """Returns everything public as parameters: the exports, and the exported classes' own methods."""
    found = []
    for package in ROOMS:
        for name in package.__all__:
            thing = getattr(package, name)
            found.append(pytest.param(thing, id=f"{package.__name__}.{name}"))
            found += [pytest.param(m, id=f"{package.__name__}.{name}.{n}") for n, m in members(thing).items()]
    return found


def members(thing: Any) -> dict[str, Any]:
    """Returns the public methods and properties of a class that are written here; torch's are not."""
    if not inspect.isclass(thing):
        return {}
    own = [kind for kind in reversed(thing.__mro__) if kind.__module__.partition(".")[0] in ("persample", "fngd")]
    every = {name: member for kind in own for name, member in vars(kind).items()}
    return {
        name: member
        for name, member in every.items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }


@pytest.mark.parametrize("thing", public())
def test_public_name_is_documented(thing: Any) -> None:
    text = inspect.getdoc(thing)
    assert text, "no docstring"
    first = text.partition("\n\n")[0]
    assert first.endswith((".", ":")), "the first paragraph is a sentence"
    if inspect.isfunction(thing) and inspect.signature(thing).return_annotation not in (None, "None"):
        assert re.search(r"\b[Rr]eturns\b", first), f"the first sentence does not say what is returned: {first!r}"


@pytest.mark.parametrize("thing", public())
def test_public_name_has_an_example(thing: Any, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id.rpartition(".")[2]
    if hasattr(torch.optim.Optimizer, name):
        return  # step, state_dict …: torch's interface, used in the example of the class
    assert ">>>" in (thing.__doc__ or ""), "the docstring has no example"


# --- examples -----------------------------------------------------------------------------------------------


def documented() -> list[Any]:
    """Returns every docstring in both packages that has examples, with the globals of its module.

    By hand, because doctest's own finder skips functions that a decorator (jaxtyping's, in the tests) has wrapped.
    """
    found = []
    for package in PACKAGES:
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
    attempted, report = run_doctest(text, given, module.__name__)
    assert attempted
    assert not report, report


def run_doctest(text: str, given: dict[str, Any], name: str) -> tuple[int, str]:
    """Returns (number of examples, what doctest says about those that failed)."""
    test = doctest.DocTestParser().get_doctest(textwrap.dedent(text), given, name, None, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        runner.run(test, out=report.write)
    return len(test.examples), report.getvalue()


def test_a_wrong_example_is_seen() -> None:
    assert "Expected" in run_doctest(">>> 1 + 1\n3", {}, "planted")[1]


# --- the reference and the site ---------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_reference_names_all_exports(package: ModuleType) -> None:
    page = (ROOT / "docs" / "reference" / f"{package.__name__}.md").read_text()
    named = [line.removeprefix("::: ") for line in page.splitlines() if line.startswith("::: ")]
    rooms = [room for room in ROOMS if room.__name__.partition(".")[0] == package.__name__]
    there = [
        f"{room.__name__}.{name}"
        for room in rooms
        for name in room.__all__
        if room is package or name not in package.__all__  # GaussNewton is at both doors
    ]
    assert sorted(named) == sorted(there)


@needs_docs
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    assert "WARNING" not in build.stderr
    for package in PACKAGES:
        page = (tmp_path / "site" / "reference" / f"{package.__name__}.html").read_text()
        for name in package.__all__:
            full = f"{package.__name__}.{name}"
            for anchor in (full, *(f"{full}.{method}" for method in members(getattr(package, name)))):
                assert f'id="{anchor}"' in page, f"{anchor} is not in the reference"
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (tmp_path / "site" / "notebooks" / f"{notebook.stem}.html").read_text()
        assert f'src="{notebook.stem}_' in page, f"{notebook.stem} shows no picture"


def module_of(name: str) -> Any:
    """Imports a module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_docs
def test_examples_of_the_hooks() -> None:
    module = module_of("_hooks")
    examples = [text for _, text in docstrings(module) if ">>>" in text]
    assert examples
    for text in examples:
        assert not run_doctest(text, vars(module), "_hooks")[1]


@needs_docs
def test_examples_become_code() -> None:
    fenced = module_of("_docstrings").fenced
    assert fenced("One.\n\n  >>> 1 + 1\n  2\n\nTwo.") == "One.\n\n  ```pycon\n  >>> 1 + 1\n  2\n  ```\n\nTwo."


@needs_docs
def test_links_become_those_of_the_site() -> None:
    hooks = module_of("_hooks")
    files = SimpleNamespace(get_file_from_path=lambda uri: uri if uri == "architecture.md" else None)
    text = "[a](docs/architecture.md#uses) [b](LICENSE) [c](https://x.org)\n```\n[d](nowhere)\n```\n"
    expected = "[a](../architecture.md#uses) b [c](https://x.org)\n```\n[d](nowhere)\n```\n"
    assert hooks.relinked(text, "README.md", "how-to/page.md", files) == expected
    with pytest.raises(hooks.PluginError, match=r"README.md links to nowhere.md, which is not there"):
        hooks.relinked("[e](nowhere.md)", "README.md", "index.md", files)


@needs_docs
def test_an_include_that_finds_nothing_is_an_error() -> None:
    hooks = module_of("_hooks")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="benchmarks.md"))
    with pytest.raises(hooks.PluginError, match=r"includes nowhere/\*.md, which finds nothing"):
        hooks.on_page_markdown("<!-- include: nowhere/*.md -->", page, None, None)
