"""`make matrix`: installs the project in one new environment after the other, runs tests there, and keeps what passed.

Each environment is a Python and a torch; the rest comes as pyproject.toml has it. It is made in a temporary folder from
a copy of the repository, and removed before the next one. Results go to docs/versions.json, one entry for each pair,
and from there into the table of README.md.

python tests/helpers/matrix.py [--pairs 3.10:2.8.0,…] [--what smoke|full] [--where DIR]
python tests/helpers/matrix.py --table      the table alone, from what is kept
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "versions.json"
PAIRS = ("3.10:2.8.0", "3.11:2.10.0", "3.12:2.13.0", "3.13:2.14.1", "3.14:2.15.0")
"""The edges of the range in pyproject.toml and points between: Python and torch."""
SMOKE = (
    *("tests/project/test_readme.py", "tests/release/test_start.py", "tests/fngd/demo"),
    *("tests/persample/backends", "tests/persample/result", "tests/persample/reweighting"),
    "tests/persample/testing/test_cases.py",
    *("tests/fngd/natural/test_optimizers.py", "tests/fngd/kronecker/test_kfac.py"),
    "tests/fngd/least_squares/test_gauss_newton.py",
)
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"


def interpreter(version: str) -> str | None:
    """The Python of a version on this machine: on the path, or one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    builds = sorted(root.glob(f"{version}.*/bin/python{version}"))
    candidates = [shutil.which(f"python{version}"), *map(str, builds), sys.executable]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.stdout.strip() == version:
            return candidate
    return None


def copy_of_repository(where: Path) -> Path:
    """What git keeps, with changes, in a folder of its own: building leaves files behind."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, where / name)
    return where


def run_pair(python: str, torch: str, what: str, folder: Path) -> dict[str, Any] | None:
    """Installs and tests in `folder`; None where this machine has no such Python."""
    found = interpreter(python)
    if found is None:
        print(f"no Python {python} on this machine: nothing was run", file=sys.stderr)
        return None
    copy = copy_of_repository(folder / "copy")
    subprocess.run([found, "-m", "venv", str(folder / "env")], check=True)
    own = str(folder / "env" / "bin" / "python")

    def pip(*words: str) -> bool:
        return subprocess.run([own, "-m", "pip", "install", "-q", *words], cwd=copy, check=False).returncode == 0

    # An exact pin finds a build for processors alone, where there is one; the ordinary wheel brings gigabytes of CUDA.
    if not (pip(f"torch=={torch}+cpu") or pip(f"torch=={torch}")):
        raise RuntimeError(f"torch {torch} cannot be installed on Python {python}")
    if not pip("-e", ".[test,opacus]", f"torch=={torch}"):
        raise RuntimeError(f"the project cannot be installed on Python {python} with torch {torch}")
    told = "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"
    versions = subprocess.run([own, "-c", told], capture_output=True, text=True, check=True).stdout.split()
    tests = SMOKE if what == "smoke" else ()
    log = folder / "log"
    with log.open("w") as out:
        command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        subprocess.run(command, cwd=copy, stdout=out, stderr=subprocess.STDOUT, check=False)
    print(log.read_text()[-6000:])
    return {
        "python": versions[0],
        "torch": versions[1],
        "numpy": versions[2],
        "what": what,
        **counted(log.read_text()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": platform.machine(),
    }


def counted(log: str) -> dict[str, int]:
    """How many tests passed, failed and were skipped, by pytest's last line.

    >>> counted("1 failed, 5 passed, 2 skipped, 3 deselected in 2.0s")
    {'passed': 5, 'failed': 1, 'skipped': 2}
    """
    last = next((line for line in reversed(log.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    count = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    failed = count.get("failed", 0) + count.get("error", 0) + count.get("errors", 0)
    return {"passed": count.get("passed", 0), "failed": failed, "skipped": count.get("skipped", 0)}


def kept() -> list[dict[str, Any]]:
    """The entries so far."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else []


def keep(entry: dict[str, Any]) -> None:
    """Puts an entry in the place of that of the same Python, torch and tests; sorted by torch, then Python."""

    def key(one: dict[str, Any]) -> tuple[str, str, str]:
        return one["torch"], one["python"], one["what"]

    def order(one: dict[str, Any]) -> list[Any]:
        return [[int(n) for n in re.findall(r"\d+", one[name])] for name in ("torch", "python")] + [one["what"]]

    entries = [one for one in kept() if key(one) != key(entry)]
    KEPT.write_text(json.dumps(sorted([*entries, entry], key=order), indent=1) + "\n")


def table(entries: list[dict[str, Any]]) -> str:
    """The entries as Markdown."""
    words = {"smoke": "examples, commands, backends, results, reweighting, optimisers", "full": "all default tests"}
    lines = ["| Python | torch | what was run | passed | failed | date |", "| --- | --- | --- | ---: | ---: | --- |"]
    lines += [
        f"| {e['python']} | {e['torch']} | {words[e['what']]} | {e['passed']} | {e['failed']} | {e['date']} |"
        for e in entries
    ]
    return "\n".join(lines)


def write_table() -> None:
    """Puts the table between its two marks in README.md."""
    page = ROOT / "README.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{table(kept())}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    """Runs the pairs; returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=",".join(PAIRS), metavar="PYTHON:TORCH,…", help="default %(default)s")
    parser.add_argument("--what", choices=("smoke", "full"), default="smoke")
    parser.add_argument("--where", type=Path, metavar="DIR", help="for the environments (default: a temporary folder)")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    failed = False
    for pair in () if options.table else options.pairs.split(","):
        python, _, torch = pair.partition(":")
        with tempfile.TemporaryDirectory(dir=options.where) as folder:
            entry = run_pair(python, torch, options.what, Path(folder))
        if entry is not None:
            keep(entry)
            failed |= entry["failed"] > 0 or entry["passed"] == 0
    write_table()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
