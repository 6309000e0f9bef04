"""The claim-by-claim table of README.md, filled from the results and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.record import Experiment, load_record

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- verdicts: begin, written by `python -m experiments verdicts` -->", "<!-- verdicts: end -->"
HEAD = "| what the paper says | scale | what was measured | verdict |\n| --- | --- | --- | --- |"


def files(folder: Path, name: str) -> list[Path]:
    """Returns the records of an experiment, but for smoke runs: small before full, CPU before GPU."""
    found = [path for scale in ("small", "full") for path in sorted(folder.glob(f"{name}-{scale}*.json"))]
    return [
        path for path in found if path.stem.removeprefix(f"{name}-") in ("small", "full", "small-cuda", "full-cuda")
    ]


def table(known: Mapping[str, Experiment], folder: Path) -> str:
    """Returns the table as Markdown: a row for each claim and each scale at which it was measured."""
    rows = []
    for name, experiment in known.items():
        found = [(path, load_record(path)) for path in files(folder, name)]
        for claim in experiment.claims:
            answers = [(path, record, claim.judge(record)) for path, record in found if record.units]
            lines = [
                f"[{record.scale}{', GPU' if record.device != 'cpu' else ''}](results/{path.stem}.md) | "
                f"{_cell(verdict.measured)} | **{verdict.judgement}**"
                for path, record, verdict in answers
                if verdict is not None
            ] or [f"`{name}` | not yet measured | –"]
            rows += [f"| {_cell(claim.paper)} | {line} |" for line in lines]
    return "\n".join([HEAD, *rows])


def write(known: Mapping[str, Experiment], folder: Path, readme: Path) -> int:
    """Puts the table between the markers of `readme`. Raises ValueError where they are missing."""
    text = readme.read_text() if readme.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} must hold the lines {BEGIN!r} and {END!r}, between which the table goes")
    readme.write_text(f"{before}{BEGIN}\n\n{table(known, folder)}\n\n{END}{after}")
    print("wrote", readme)
    return 0


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
