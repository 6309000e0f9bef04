"""Experiments and their results: what every module of this folder is written against.

An experiment is a module of this folder that defines `EXPERIMENT`; it is found by that, there is no list to be kept.
Its name, help and source are texts, and its scales dicts that are written down there: `experiments.options` reads them
without importing the file. It cuts its work into **units** (one method with one seed, say), each a string:

    EXPERIMENT = Experiment(
        name="sharing",                                       # python -m experiments sharing
        help="does sharing coefficients hurt?",
        source="FNGD paper, Fig. 4",
        scales={"small": {...}, "full": {...}, "smoke": {...}},  # settings: plain JSON values
        units=units,      # units(settings) -> list[str], such as ["ngd/alpha=0.01/seed=0", …]
        run=run,          # run(unit, settings, context) -> dict of JSON values, the unit's result
        report=report,    # report(record) -> Markdown: tables with n and spread
        draw=draw,        # draw(record, stem) -> list of the paths it wrote, from the record alone
        claims=(Claim("Fig. 4: FNGD is on par with NGD", judge), …),
        needs=("sklearn",),                                   # modules that must be importable; extra "experiments"
        growing=("seeds",),   # settings that may change between calls, because they only add units
    )

`python -m experiments NAME --scale small|full|smoke [--out DIR] [--device cpu|cuda] [--threads N] [--data-dir DIR]
[--only 'ngd/*,fngd/*'] [--minutes M] [--set name=JSON …]` runs the units that DIR/NAME-SCALE.json (for a GPU
NAME-SCALE-cuda.json) does not hold yet, writes the file after each of them, whole or not at all, then writes tables
(.md) and figures (.png) beside it. Settings other than the stored ones are refused with a sentence. Several processes
may work on one file at a time if `--only` gives each units of its own. Ctrl-C, or `--minutes`, keeps what is
finished. A unit that raises ends the command; one that diverges should say so in its result.

`context` (a `Context`) gives a unit the device, the data folder, `context.progress(done, total, "text")` for the bar,
and `context.checkpoint`, a path that is this unit's own: what `torch.save` leaves there (through `context.save`)
is found by `context.load()` after an interruption, and is removed when the unit is finished. Long units should call
`context.progress` often: it is where Ctrl-C and `--minutes` take effect, by raising `Stopped`.

The file: {"format", "experiment", "scale", "device", "settings", "environments": [{versions, processor, cores,
threads, gpu …}], "units": {unit: {"result", "seconds", "date", "revision", "load", "environment": index}}}. Figures
are drawn from it alone: `python -m experiments draw`. `python -m experiments verdicts` fills the table of README.md.

A claim has a `judge(record) -> Verdict | None`: what was measured, with spread and n, and whether the claim holds at
that scale; None where the units it needs are missing. Nothing else may write a figure into that table.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import pkgutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT = 1
FOLDER = Path(__file__).parent / "results"
SCALES = ("small", "full", "smoke")
PACKAGES = ("persample", "torch", "numpy", "scikit-learn", "tokenizers", "sacrebleu")
JUDGEMENTS = ("holds", "holds in part", "does not hold", "undecided")

Settings = dict[str, Any]
Result = dict[str, Any]


class Stopped(Exception):
    """The user, or the time limit, ends the command; unfinished units are done next time."""


@dataclass(frozen=True)
class Verdict:
    """What was measured for a claim, in words with figures, spread and n, and what follows."""

    measured: str
    judgement: str

    def __post_init__(self) -> None:
        if self.judgement not in JUDGEMENTS:
            raise ValueError(f"judgement={self.judgement!r} is unknown; choose one of {list(JUDGEMENTS)}")


@dataclass(frozen=True)
class Claim:
    """What a paper says (with the place and its figures), and how a record answers."""

    paper: str
    judge: Callable[[Record], Verdict | None]


@dataclass(frozen=True)
class Experiment:
    """One command; see the module's docstring."""

    name: str
    help: str
    source: str
    scales: Mapping[str, Settings]
    units: Callable[[Settings], Sequence[str]]
    run: Callable[[str, Settings, Context], Result]
    report: Callable[[Record], str]
    draw: Callable[[Record, Path], Sequence[Path]]
    claims: tuple[Claim, ...] = ()
    needs: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()


def experiments() -> dict[str, Experiment]:
    """Returns every experiment of this folder by name."""
    found: dict[str, Experiment] = {}
    folder = Path(__file__).parent
    for module in sorted(info.name for info in pkgutil.iter_modules([str(folder)]) if info.name != "__main__"):
        content = vars(importlib.import_module(f"experiments.{module}"))
        if "EXPERIMENT" in content:
            found[content["EXPERIMENT"].name] = content["EXPERIMENT"]
    return found


@dataclass
class Context:
    """What a unit may use while it runs."""

    device: str
    data_dir: Path | None
    checkpoint: Path
    show: Callable[[float, float, str], None] = lambda done, total, text: None
    stopping: Callable[[], bool] = lambda: False

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Moves the bar. Raises Stopped where the command is to end."""
        self.show(done, total, text)
        if self.stopping():
            raise Stopped

    def save(self, state: Any) -> None:
        """Writes the unit's checkpoint; an interruption in the middle leaves the previous one."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        import torch  # here, as in all of this file, so that options can be read without it

        draft = self.checkpoint.with_suffix(".draft")
        torch.save(state, draft)
        draft.replace(self.checkpoint)

    def load(self) -> Any:
        """Returns the unit's checkpoint on its device, or None."""
        if not self.checkpoint.is_file():
            return None
        import torch

        return torch.load(self.checkpoint, map_location=self.device, weights_only=True)


@dataclass
class Record:
    """The results of an experiment at one scale on one kind of device."""

    experiment: str
    scale: str
    device: str
    settings: Settings
    environments: list[dict[str, Any]] = field(default_factory=list)
    units: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, Result]:
        """The finished units' results."""
        return {unit: entry["result"] for unit, entry in self.units.items()}

    def where(self) -> str:
        """The machines it ran on, in words: processor or GPU, threads, torch."""
        names = []
        for one in self.environments:
            chip = one.get("gpu") or f"{one['processor']}, {one['cores']} cores, {one['threads']} threads"
            names.append(f"{chip}, torch {one['versions']['torch']}")
        return "; ".join(dict.fromkeys(names))

    def add(self, unit: str, result: Result, seconds: float, load: list[float | None], path: Path) -> None:
        """Adds a finished unit and writes the file, with what other processes have added to it meanwhile."""
        here = surroundings(self.device)
        with _locked(path):
            if path.is_file():
                other = load_record(path)
                self.environments, self.units = other.environments, {**other.units}
            if here not in self.environments:
                self.environments.append(here)
            self.units[unit] = {
                "result": plain(result),
                "seconds": plain(seconds),
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                "revision": revision(),
                "load": plain(load),
                "environment": self.environments.index(here),
            }
            self.save(path)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all, a line for each unit."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "format": FORMAT,
            "experiment": self.experiment,
            "scale": self.scale,
            "device": self.device,
            "settings": self.settings,
            "environments": self.environments,
        }
        lines = [f"{json.dumps(unit)}: {json.dumps(self.units[unit], allow_nan=False)}" for unit in sorted(self.units)]
        text = json.dumps(head, indent=1)[:-2] + ',\n "units": {\n' + ",\n".join(lines) + "\n }\n}\n"
        draft = path.with_name(f"{path.name}.{os.getpid()}.part")
        draft.write_text(text)
        draft.replace(path)


def file_of(folder: Path, name: str, scale: str, device: str) -> Path:
    """Where a record is kept: NAME-SCALE.json, with -cuda where it ran on a GPU."""
    kind = device.split(":")[0]
    return folder / f"{name}-{scale}{'' if kind == 'cpu' else f'-{kind}'}.json"


def load_record(path: Path) -> Record:
    """Reads a record. Raises ValueError where the file is none."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        return Record(**{key: value for key, value in content.items() if key != "format"})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of this program: {error}. Give another --out") from error


def open_record(experiment: Experiment, scale: str, device: str, settings: Settings, path: Path) -> Record:
    """Returns the stored record to go on with, or an empty one.

    Raises ValueError where the file was measured with other settings.
    """
    kind, settings = device.split(":")[0], json.loads(json.dumps(settings))
    if not path.is_file():
        return Record(experiment.name, scale, kind, settings)
    record = load_record(path)
    names = sorted({*record.settings, *settings} - set(experiment.growing))
    changed = [name for name in names if record.settings.get(name) != settings.get(name)]
    if changed:
        raise ValueError(
            f"{path} was measured with "
            + ", ".join(f"{name}={json.dumps(record.settings.get(name))}" for name in changed)
            + ", now asked for "
            + ", ".join(f"{name}={json.dumps(settings.get(name))}" for name in changed)
            + "; give another --out, or remove the file to measure anew"
        )
    record.settings = settings
    return record


def surroundings(device: str) -> dict[str, Any]:
    """What figures depend on besides the code and the settings; names no machine and no user."""
    import torch

    from persample.testing.machine import environment as machine

    return {**machine(device, PACKAGES), "threads": torch.get_num_threads()}


def revision() -> str | None:
    """The git revision of the code, with + where files under version control have changed since; None without git."""
    try:
        words = ["git", "describe", "--always", "--exclude", "*", "--dirty=+", "--abbrev=10"]
        return subprocess.run(words, cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plain(value: Any) -> Any:
    """Returns a value as JSON knows it: six digits, null for NaN and infinity.

    >>> plain({"loss": (1 / 3, float("nan"))})
    {'loss': [0.333333, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def load_average() -> float | None:
    """Mean number of running processes in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def missing(experiment: Experiment) -> list[str]:
    """Modules that the experiment, its figures or its bars need and that are not installed."""
    return [name for name in ("rich", "matplotlib", *experiment.needs) if importlib.util.find_spec(name) is None]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the system has advisory locks."""
    try:
        import fcntl
    except ImportError:  # Windows: there do not run two processes on one file
        yield
        return
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"experiments-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stopwatch() -> Callable[[], float]:
    """Returns a function that tells the seconds since now."""
    start = time.monotonic()
    return lambda: time.monotonic() - start
