"""Adds to the site what lives outside docs/: README, CONTRIBUTING, CHANGELOG, notebooks, and measured results.

A page may hold `<!-- include: GLOB -->`, which stands for the Markdown files that the glob finds in the repository, and
`<!-- summary: PACKAGE -->`, for a table of the package's names, each with the first sentence of its docstring.
Links are those of the repository, so that they work where the files are read as they are; here each one is turned
into a link of the site, or into plain text where its target is no page of it.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FENCE = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
SUMMARY = re.compile(r"^<!-- summary: (\S+) -->$", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_config(config: Any) -> Any:
    """Puts every notebook into the navigation, by its own title."""
    pages = [f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    config.nav = [{"Notebooks": pages} if "Notebooks" in entry else entry for entry in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds generated pages and the pictures they show."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pictures: dict[str, bytes] = {}
        text = notebook_page(json.loads(path.read_text()), path.stem, pictures)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for path in sorted((ROOT / "experiments" / "results").glob("*.md")):  # the page of experiments links to them
        target = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, target, content=path.read_text(), inclusion=InclusionLevel.NOT_IN_NAV))
    for folder in ("benchmarks/results", "experiments/results"):
        for path in sorted((ROOT / folder).glob("**/*.png")):
            target = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, target, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Includes what the page asks for, and makes the links those of the site."""
    here = page.file.src_uri
    origin = next((source for source, target in PAGES.items() if target == here), None)
    if origin is None and here.startswith("experiments/"):
        origin = here
    if origin is None:
        origin = here.replace(".md", ".ipynb") if here.startswith("notebooks/") else f"docs/{here}"

    def included(found: re.Match[str]) -> str:
        paths = sorted(ROOT.glob(found[1]))
        if not paths:
            raise PluginError(f"{origin} includes {found[1]}, which finds nothing")
        texts = [(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]
        return "\n\n".join(relinked(demoted(text), name, here, files) for name, text in texts)

    markdown = SUMMARY.sub(lambda found: summary(found[1]), markdown)
    parts = INCLUDE.split(relinked(markdown, origin, here, files))
    matches = list(INCLUDE.finditer(markdown))
    return "".join(part if number % 2 == 0 else included(matches[number // 2]) for number, part in enumerate(parts))


def summary(package: str) -> str:
    """Returns the table of a package's public names, as links into the page."""
    module = importlib.import_module(package)
    lines = ["| name | what it is |", "| --- | --- |"]
    for name in module.__all__:
        text = " ".join((inspect.getdoc(getattr(module, name)) or "").partition("\n\n")[0].split())
        lines.append(f"| [`{name}`](#{package}.{name}) | {first_sentence(text)} |")
    return "\n".join(lines)


def first_sentence(text: str) -> str:
    """Returns the text up to its first full stop or colon that ends a sentence, safe in a table.

    >>> first_sentence("Returns g_b = z|x, e.g. 1.5. And more.")
    'Returns g_b = z\\\\|x, e.g. 1.5.'
    """
    end = re.search(r"(?<!e\.g)(?<!i\.e)[.:](?= [A-Z]|$)", text)
    return text[: end.end() if end else None].replace("|", "\\|").replace("*", "\\*")


def demoted(text: str) -> str:
    """Returns the text with every heading one level lower.

    >>> demoted("# One")
    '## One'
    """
    return outside_fences(text, lambda part: re.sub(r"^(#+ )", r"#\1", part, flags=re.MULTILINE))


def relinked(text: str, origin: str, here: str, files: Any) -> str:
    """Returns the text of the repository's file `origin` with links as page `here` of the site needs them."""

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        uri = site_uri(wanted)
        if files.get_file_from_path(uri) is None:
            if not (ROOT / wanted).exists():
                raise PluginError(f"{origin} links to {target}, which is not there")
            return words
        return f"{picture}[{words}]({os.path.relpath(uri, posixpath.dirname(here) or '.')}{hash_}{anchor})"

    return outside_fences(text, lambda part: LINK.sub(link, part))


def site_uri(path: str) -> str:
    """Returns the page or picture of the site that a path of the repository has become.

    >>> site_uri("docs/architecture.md"), site_uri("README.md"), site_uri("notebooks/01.ipynb")
    ('architecture.md', 'index.md', 'notebooks/01.md')
    """
    if path in PAGES:
        return PAGES[path]
    if path == "experiments/README.md":
        return "experiments.md"
    if re.fullmatch(r"benchmarks/results/[^/]*\.md", path):
        return "benchmarks.md"
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Returns the text with `change` applied to all but its fenced code."""
    result, position = [], 0
    for fence in FENCE.finditer(text):
        result += [change(text[position : fence.start()]), fence[0]]
        position = fence.end()
    return "".join([*result, change(text[position:])])


def notebook_page(notebook: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    """Returns a notebook as Markdown, code folded after the output it makes; fills `pictures` by file name."""
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for order, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}_{number}_{order}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output of the cell above](../notebooks/{name})")
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                parts.append(f"```text\n{ESCAPES.sub('', text).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
