"""The options of `python -m experiments`. Does without torch, so that help and mistakes are there at once.

Experiments are found by what their files declare, read and not imported: name, help, source, and the names of the
settings of each scale.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.record import FOLDER, SCALES
from experiments.verdicts import README
from persample.testing.command_line import whole
from persample.testing.start import add_version


@dataclass(frozen=True)
class Declared:
    """What an experiment's file says of it."""

    name: str
    help: str
    source: str
    scales: Mapping[str, Mapping[str, None]]
    """Scale -> the names of its settings, without their values."""


def declared(folder: Path = Path(__file__).parent) -> dict[str, Declared]:
    """Returns the experiments of a folder by name; `EXPERIMENT = Experiment(…)` in a file makes one."""
    found = [one for path in sorted(folder.glob("*.py")) for one in _declared(ast.parse(path.read_text()))]
    return {one.name: one for one in found}


def _declared(tree: ast.Module) -> Iterator[Declared]:
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            values.update({target.id: node.value for target in targets if isinstance(target, ast.Name)})
    made = values.get("EXPERIMENT")
    if isinstance(made, ast.Call):
        given = {keyword.arg: keyword.value for keyword in made.keywords}
        name, words, source = (ast.literal_eval(given[word]) for word in ("name", "help", "source"))
        scales = {scale: dict.fromkeys(names) for scale, names in _keys(given["scales"], values)}
        yield Declared(name, words, source, scales)


def _keys(node: ast.expr, values: Mapping[str, ast.expr]) -> list[tuple[str, list[str]]]:
    """The keys of a dict that is written down, `**NAME` of the same file included, each with the keys of its value."""
    if isinstance(node, ast.Name):
        return _keys(values[node.id], values) if node.id in values else []
    if not isinstance(node, ast.Dict):
        return []
    found: dict[str, list[str]] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            found.update(_keys(value, values))
        else:
            found[str(ast.literal_eval(key))] = [name for name, _ in _keys(value, values)]
    return list(found.items())


def parser(known: Mapping[str, Declared], description: str) -> argparse.ArgumentParser:
    """Returns the command line: a command for each experiment, and those for all of them."""
    made = argparse.ArgumentParser(
        prog="python -m experiments", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(made, "experiments")
    commands = made.add_subparsers(dest="command", required=True, metavar="NAME")
    for experiment in known.values():
        command = commands.add_parser(experiment.name, help=f"{experiment.source}: {experiment.help}")
        command.description = f"{experiment.source}: {experiment.help}."
        _add_common(command, [scale for scale in SCALES if scale in experiment.scales])
        add = command.add_argument
        add("--only", default="*", metavar="A,B,…", help="units to run, by patterns such as 'fngd/*' (default all)")
        add("--set", action="append", default=[], metavar="NAME=JSON", help="another setting than the scale's")
        if any({"methods", "trials"} <= settings.keys() for settings in experiment.scales.values()):
            add("--optimizers", metavar="A,B,…", help="other methods than the scale's: names, or module:function")
        add("--list", action="store_true", help="print the settings and the units, and which are finished")
    every = commands.add_parser("all", help="every experiment; what cannot run is told at the end")
    every.set_defaults(only="*", set=[], list=False)
    _add_common(every, list(SCALES))
    draw = commands.add_parser("draw", help="figures and tables from the results alone")
    draw.add_argument("names", nargs="*", metavar="NAME", help="default all")
    verdict = commands.add_parser("verdicts", help="fill the claim-by-claim table of README.md from the results")
    verdict.add_argument("--readme", type=Path, default=README, metavar="FILE", help="default %(default)s")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where results are kept")
    return made


def _add_common(command: argparse.ArgumentParser, scales: list[str]) -> None:
    add = command.add_argument
    add("--scale", choices=scales, default="small", help="small fits 2 CPU cores, full is the paper's (for a GPU)")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, …")
    add("--threads", type=whole(), default=None, metavar="N", help="threads of torch (default: torch's)")
    add("--data-dir", type=Path, default=None, metavar="DIR", help="the folder of the data sets")
    add("--minutes", type=_minutes, default=None, metavar="M", help="stop each experiment after about M minutes")


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes: at least 0, such as 30 or 0.5")
    return minutes
