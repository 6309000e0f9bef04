"""Who is right on five models that everybody builds: ours and other libraries, beside one sample at a time.

Each verdict is found now where the library is installed. For libraries that are not, `recorded.json` says what was
found, when, and with which versions; `python -m fngd.demo.verdicts` writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from persample.testing.cases import find
from persample.testing.conformance import expected, try_backend, try_peer
from persample.testing.machine import versions
from persample.testing.peers import PEERS

RECORDED = Path(__file__).with_name("recorded.json")
OURS = "persample"
THEIRS = {"Opacus": "Opacus hooks", "BackPACK": "BackPACK", "TorchJD": "TorchJD", "vmap": "torch.func"}
"""Heading -> name in `PEERS`."""
MODELS = {
    "tied weights": "usage/tied-weights",
    "time first": "layout/batch on axis 1 inside, T=B",
    "functional weight": "usage/functional-use-and-call",
    "module called twice": "usage/module-called-twice",
    "mixture of experts": "language/mixture of experts",
}
"""What it is called here -> its case."""


@dataclass(frozen=True)
class Verdict:
    """What one library answers on one model: "exact", "refused" or "wrong", and whether it was found just now."""

    model: str
    library: str
    verdict: str
    live: bool
    detail: str = ""
    """The relative deviation from one sample at a time, or the beginning of the error."""


def verdicts(progress: Callable[[str], None] = lambda text: None) -> list[Verdict]:
    """Returns ours and theirs, model by model; `progress` is called with the name of each model."""
    found = []
    for model, name in MODELS.items():
        progress(model)
        case = find(name)
        want = expected(case)
        cell = try_backend(case, "outputs", want)
        found.append(Verdict(model, OURS, cell.verdict, True, cell.detail))
        for library, key in THEIRS.items():
            if PEERS[key].installed:
                cell = try_peer(case, PEERS[key], want)
                found.append(Verdict(model, library, cell.verdict, True, cell.detail[:150]))
            else:
                found.append(Verdict(model, library, recorded()["verdicts"][model][library], False))
    return found


def recorded() -> dict[str, Any]:
    """Returns {"date", "versions": {package: version}, "verdicts": {model: {library: verdict}}}."""
    return json.loads(RECORDED.read_text())


def source(found: Sequence[Verdict]) -> str:
    """Returns where verdicts come from that were not found now, in a sentence; nothing where all were."""
    absent = [library for library in THEIRS if any(v.library == library and not v.live for v in found)]
    if not absent:
        return ""
    known = recorded()
    packages = [PEERS[THEIRS[library]].package for library in absent]
    named = ", ".join(f"{package} {known['versions'][package]}" for package in packages)
    return f"{', '.join(absent)}: not installed here; as recorded on {known['date']} with {named}."


def record() -> None:
    """Writes what is found now. Raises ValueError where a library is missing."""
    found = verdicts()
    missing = sorted({verdict.library for verdict in found if not verdict.live})
    if missing:
        raise ValueError(f"{', '.join(missing)}: not installed, so nothing was recorded; install the bench extra")
    packages = ["torch", *dict.fromkeys(PEERS[key].package for key in THEIRS.values())]
    kept = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(packages),
        "verdicts": {
            model: {v.library: v.verdict for v in found if v.model == model and v.library != OURS} for model in MODELS
        },
    }
    RECORDED.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    record()
