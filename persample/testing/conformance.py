"""`python -m persample conformance`: every backend, and other libraries, on every case of the table.

A cell says what happened: exact, agreeing with the loop over samples; refused, by an error or for lack of a
result; **wrong**, a result that is neither; crash, for our own backends, an error that is not one of ours.
Samples of coupled cases have no gradients of their own: there a refusal is right.
"""

from __future__ import annotations

import platform
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persample.blocks.reductions import real_rows
from persample.errors import PerSampleError
from persample.result.api import backends, per_sample
from persample.testing.cases import CASES, Case
from persample.testing.command_line import console
from persample.testing.loop import deviation, loop_grads
from persample.testing.peers import PEERS, Peer

VERDICTS = ("exact", "refused", "wrong", "crash")
SIGNS = {"exact": "✓", "refused": "·", "wrong": "**✗**", "crash": "**‼**"}
"""What stands for a verdict in a table."""
TOLERANCE = 1e-8
"""Largest relative deviation that counts as exact, in float64."""
FLOAT32_TOLERANCE = 1e-5
"""The same where a part of the model computes in float32."""
SEED = 1


@dataclass(frozen=True)
class Cell:
    """What happened to one case in one column, and the detail behind it."""

    verdict: str
    detail: str = ""


def verdict_of(miss: float, case: Case) -> Cell:
    """The verdict on a result with that relative deviation."""
    tolerance = FLOAT32_TOLERANCE if "float32" in case.tags else TOLERANCE
    return Cell("exact" if miss <= tolerance else "wrong", f"{miss:.1e}")


@contextmanager
def guarded() -> Iterator[None]:
    """Keeps warnings silent, and torch's global state as it was, whatever a library does to it."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


def expected(case: Case) -> dict[str, Tensor]:
    """The loop's gradients."""
    with guarded():
        return loop_grads(*case.build())


def try_backend(case: Case, backend: str, want: dict[str, Tensor]) -> Cell:
    """The cell of one of our backends."""
    try:
        with guarded():
            got = per_sample(*case.build(), backend=backend).grads()
    except Exception as error:
        return Cell("refused" if is_ours(error) else "crash", f"{type(error).__name__}: {error}")
    return verdict_of(deviation(got, want), case)


def is_ours(error: Exception) -> bool:
    """Whether the error is a sentence of ours: of our own types, or ValueError or TypeError raised in our files."""
    if isinstance(error, PerSampleError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__).parents[1]
    last = Path(frames[-1].filename) if frames else Path()
    return (
        isinstance(error, (ValueError, TypeError))
        and here in last.parents
        and here / "testing" / "cases" not in last.parents
    )


def try_peer(case: Case, peer: Peer, want: dict[str, Tensor]) -> Cell:
    """The cell of another library; every exception is a refusal, and so is a result that lacks parameters."""
    batch = len(next(iter(want.values()))) if want else 0
    try:
        with guarded():
            got = peer.run(case.build(), batch)
            return compared(got, peer.offers, want, case)
    except Exception as error:
        return Cell("refused", f"{type(error).__name__}: {error}")


def compared(got: Any, offers: str, want: dict[str, Tensor], case: Case) -> Cell:
    """The verdict on gradients, norms or a Gram matrix."""
    if offers == "gram":
        gram = sum((real_rows(g) @ real_rows(g).T for g in want.values()), start=torch.zeros(()))
        return verdict_of(deviation({"": got}, {"": gram}), case)
    used = {name: g for name, g in want.items() if bool(g.any()) or name in got}
    missing = sorted(used.keys() - got.keys())
    if missing:
        return Cell("refused", f"no result for {missing[0]!r}")
    truth = used if offers == "grads" else {name: real_rows(g).norm(dim=1) for name, g in used.items()}
    return verdict_of(deviation({name: got[name] for name in truth}, truth), case)


def columns(peers: bool) -> dict[str, Callable[[Case, dict[str, Tensor]], Cell]]:
    """What fills each column, by its heading."""

    def ours(backend: str) -> Callable[[Case, dict[str, Tensor]], Cell]:
        return lambda case, want: try_backend(case, backend, want)

    def theirs(peer: Peer) -> Callable[[Case, dict[str, Tensor]], Cell]:
        return lambda case, want: try_peer(case, peer, want)

    filled = {backend: ours(backend) for backend in backends()}
    if peers:
        filled.update({name: theirs(peer) for name, peer in PEERS.items() if peer.installed})
    return filled


Matrix = dict[str, dict[str, Cell]]


def matrix(cases: tuple[Case, ...], peers: bool, progress: Callable[[str], None]) -> Matrix:
    """Returns case name -> column -> cell; `progress` is called with the name of each case."""
    filled = columns(peers)
    result: Matrix = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    try:
        for case in cases:
            progress(case.name)
            want = expected(case)
            result[case.name] = {name: fill(case, want) for name, fill in filled.items()}
    finally:
        torch.set_num_threads(threads)
    return result


def counts(found: Matrix) -> dict[str, Counter[str]]:
    """How often each verdict stands in each column."""
    result: dict[str, Counter[str]] = {}
    for row in found.values():
        for name, cell in row.items():
            result.setdefault(name, Counter())[cell.verdict] += 1
    return result


def markdown(found: Matrix) -> str:
    """The matrix as a page of documentation: totals, then a table for each family of cases."""
    names = list(counts(found))
    coupled = {case.name for case in CASES if case.coupled}
    libraries = sorted({f"{PEERS[n].package} {PEERS[n].version}" for n in names if n in PEERS} | {_torch()})
    families: dict[str, Matrix] = {}
    for case, row in found.items():
        families.setdefault(case.partition("/")[0], {})[case] = row
    lines = [
        "# Conformance",
        "",
        f"{len(found)} models with a batch; in each cell a backend or library against a loop that differentiates one",
        "sample at a time, in float64.",
        "",
        *totals(found),
        "",
        "✓ exact: agrees with the loop to 1e-8 (1e-5 where part of the model computes in float32). · refused: an",
        "error, or no result. **✗ wrong**: a result that is not the gradient, without a word. Cases marked ◦ couple",
        "their samples, so that a refusal is the right answer. The first four columns are our backends, the others",
        "are other libraries, called as their documentation says, with the batch on axis 0.",
        "",
        f"Measured on {date.today().isoformat()} by `python -m persample conformance --peers --out FILE.md` with "
        f"{', '.join(libraries)}, Python {platform.python_version()}.",
    ]
    for family, rows in families.items():
        lines += ["", f"## {family.capitalize()}: {len(rows)} cases", "", _line(["case", *names])]
        lines.append(_line(["---", *(":---:" for _ in names)]))
        for case, row in rows.items():
            title = _code(case.partition("/")[2]) + (" ◦" if case in coupled else "")
            lines.append(_line([title, *(SIGNS[row[name].verdict] for name in names)]))
    return "\n".join(lines) + "\n"


def totals(found: Matrix) -> list[str]:
    """How often each verdict stands in each column, as lines of Markdown."""
    total = counts(found)
    verdicts = [v for v in VERDICTS if v != "crash" or any(count[v] for count in total.values())]
    rows = [[name, *(str(count[v]) for v in verdicts)] for name, count in total.items()]
    ours = backends()
    for row in rows:
        row[0] = f"`{row[0]}`" if row[0] in ours else row[0]
        wrong = 1 + verdicts.index("wrong")
        row[wrong] = row[wrong] if row[wrong] == "0" else f"**{row[wrong]}**"
    return [
        _line([f"of {len(found)} cases", *verdicts]),
        _line(["---", *("---:" for _ in verdicts)]),
        *map(_line, rows),
    ]


BEGIN = "<!-- conformance: begin, written by `make conformance` -->"
END = "<!-- conformance: end -->"


def put_totals(found: Matrix, page: Path) -> None:
    """Writes the totals between the two marks of a page.

    Raises:
        ValueError: the page lacks them.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must hold the lines {BEGIN!r} and {END!r}, between which the totals go")
    lines = "\n".join(totals(found))
    page.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}", encoding="utf-8")


def _torch() -> str:
    return f"torch {torch.__version__}"


def _code(name: str) -> str:
    return f"`{name}`".replace("|", "\\|")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown_matrix(found: Matrix) -> Any:
    """The matrix as a rich table, a sign in each cell."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    styles = {"exact": "green", "refused": "dim", "wrong": "bold red", "crash": "bold magenta"}
    signs = {verdict: Text(SIGNS[verdict].strip("*"), style=style) for verdict, style in styles.items()}
    result = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption="✓ exact   · refused   ✗ wrong   ‼ crash"
    )
    result.add_column("case", no_wrap=True)
    for name in counts(found):
        result.add_column(name, justify="center", no_wrap=True)
    for case, row in found.items():
        result.add_row(case, *(signs[cell.verdict] for cell in row.values()))
    return result


def summary(found: Matrix) -> Any:
    """Counts of the verdicts as a rich table."""
    from rich import box
    from rich.table import Table

    result = Table(title=f"{len(found)} cases", box=box.SIMPLE_HEAD)
    for heading in ("", *VERDICTS):
        result.add_column(heading, justify="right" if heading else "left")
    for name, count in counts(found).items():
        result.add_row(name, *(str(count[verdict]) for verdict in VERDICTS))
    return result


def run(*, peers: bool, out: Path | None, containing: str = "", page: Path | None = None) -> int:
    """Runs the table, prints the matrix and writes it; returns 1 if one of our backends was wrong or crashed."""
    from rich.progress import BarColumn, Progress, TextColumn

    plain = console()
    cases = tuple(case for case in CASES if containing in case.name)
    if not cases:
        plain.print(f"no case has {containing!r} in its name; there are {len(CASES)} cases")
        return 2
    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(*columns, console=plain, transient=True) as bar:
        task = bar.add_task("", total=len(cases))

        def progress(name: str) -> None:
            bar.update(task, description=f"{name:50.50}")
            bar.advance(task)

        found = matrix(cases, peers, progress)
    shown = shown_matrix(found)
    width = plain.measure(shown, options=plain.options.update(max_width=1000)).maximum
    console(width=max(width, plain.width)).print(shown)  # in a narrow terminal rich would drop columns
    plain.print(summary(found))
    missing = [peer.name for peer in PEERS.values() if peers and not peer.installed]
    if missing:
        plain.print(f"not installed: {', '.join(missing)}")
    bad = [(case, name, row[name]) for case, row in found.items() for name in backends()
           if row[name].verdict in ("wrong", "crash")]  # fmt: skip
    for case, name, cell in bad:
        plain.print(f"{cell.verdict} {name} on {case}: {cell.detail[:300]}", style="red")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(markdown(found), encoding="utf-8")
        plain.print(f"matrix: {out}")
    if page is not None:
        put_totals(found, page)
        plain.print(f"totals: {page}")
    return 1 if bad else 0
