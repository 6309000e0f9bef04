"""`python -m persample report`: what a report of a problem needs, and nothing that tells who or where.

Versions and the machine; of a model, where a file gives one, the layers' paths, types and shapes, and what every
backend answers beside the loop over samples. No value of a parameter or of the data is printed.
"""

from __future__ import annotations

import copy
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persample.result.api import backends
from persample.testing.cases import Case
from persample.testing.conformance import Cell, expected, try_backend
from persample.testing.machine import environment
from persample.testing.start import VERSION

PACKAGES = ("torch", "numpy", "einops", "jaxtyping", "typing_extensions", "opacus", "torchvision", "transformers")
NEEDED = ("model", "loss_fn", "inputs", "targets")
PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"/\\:]+[/\\])+")


def text(file: Path | None) -> str:
    """Returns the report, as Markdown.

    Args:
        file: Python that sets `model` and may set `loss_fn`, `inputs` and `targets`, as `persample.per_sample` takes
            them; it is run.

    Raises:
        ValueError: the file cannot be run, or sets no model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(device, PACKAGES)
    versions = {name: version for name, version in about.pop("versions").items() if version}
    lines = ["## Versions", "", *_table({"persample": VERSION, "python": about.pop("python"), **versions})]
    lines += ["", "## Machine", "", *_table({**about, "threads": torch.get_num_threads()})]
    if file is None:
        return "\n".join([*lines, "", "No model was given: `python -m persample report FILE.py` adds one."])
    given = _run(file)
    lines += ["", "## Layers", "", "| layer | type | parameters and buffers |", "| --- | --- | --- |"]
    lines += [f"| {path or '(the model)'} | {kind} | {own} |" for path, kind, own in layers(given["model"])]
    missing = [name for name in NEEDED[1:3] if name not in given]
    if missing:
        return "\n".join([*lines, "", f"Backends were not tried: the file sets no {' and no '.join(missing)}."])
    lines += ["", "## Data", "", *_table({name: shapes(given.get(name)) for name in NEEDED[2:]})]
    lines += ["", "## Backends", "", *_table({name: _told(cell) for name, cell in answers(given).items()})]
    return "\n".join(lines)


def _run(file: Path) -> dict[str, Any]:
    try:
        given = runpy.run_path(str(file))
    except Exception as error:
        raise ValueError(f"running {file} failed: {type(error).__name__}: {error}") from error
    if not isinstance(given.get("model"), nn.Module):
        found = type(given["model"]).__name__ if "model" in given else "nothing"
        raise ValueError(f"{file} must set model to a torch.nn.Module; got {found}")
    return given


def layers(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yields path, type and shapes of what it holds itself, for each module that holds something or no other module.

    >>> list(layers(nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh())))
    [('0', 'Linear', 'weight [2, 3]'), ('1', 'Tanh', '')]
    """
    for path, module in model.named_modules(remove_duplicate=False):
        parameters = dict(module.named_parameters(recurse=False))
        own = [
            f"{name} {list(value.shape)}"
            + ("" if value.dtype == torch.float32 else f" {str(value.dtype).removeprefix('torch.')}")
            + ("" if value.requires_grad or name not in parameters else ", frozen")
            for name, value in (parameters | dict(module.named_buffers(recurse=False))).items()
        ]
        if own or not list(module.children()):
            kind = type(module)
            home = kind.__module__.partition(".")[0]
            whose = "" if home == "torch" else f" ({home if home in PACKAGES else 'own'})"
            yield path, kind.__name__ + whose, "; ".join(own)


def shapes(tree: Any) -> str:
    """Returns types and shapes in data, without values.

    >>> shapes((torch.ones(2, 3), {"mask": torch.ones(2).bool()}, 4))
    '(float32 [2, 3], {mask: bool [2]}, int)'
    """
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {list(tree.shape)}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {shapes(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        return f"({', '.join(map(shapes, tree))})"
    return type(tree).__name__


def answers(given: Mapping[str, Any]) -> dict[str, Cell]:
    """Returns what each backend does in float64: exact, refused, wrong or crash, beside the loop over samples."""

    def build() -> Any:
        model = copy.deepcopy(given["model"])
        inputs, targets = (copy.deepcopy(given.get(name)) for name in ("inputs", "targets"))
        return model.double(), given["loss_fn"], _double(inputs), _double(targets)

    case = Case("the file's model", build)
    try:
        want = expected(case)
    except Exception as error:
        return {"the loop over samples": Cell("crash", f"{type(error).__name__}: {error}")}
    return {backend: try_backend(case, backend, want) for backend in backends()}


def _double(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.dtype == torch.float32 else t, tree)


def _told(cell: Cell) -> str:
    first = cell.detail.strip().partition("\n")[0]
    return f"{cell.verdict}: {without_paths(first)}"


def without_paths(words: str) -> str:
    """Returns the words with folders left out.

    >>> without_paths("File '/home/me/code/net.py', and/or layer 'a.b'")
    "File 'net.py', and/or layer 'a.b'"
    """
    return PATH.sub("", words)


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")
