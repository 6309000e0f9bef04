"""Before torch is imported: versions, help and mistakes at once, names complete afterwards, and an old torch told."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shapes

import fngd
import persample
from persample.testing import start

ROOT = Path(__file__).parents[2]


def run(*words: str, path: Path | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m …`, in a process of its own; `path` goes before everything else that is imported."""
    paths = [*([str(path)] if path else []), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    how = {"capture_output": True, "text": True, "check": False, "timeout": 300}
    return subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=environment, **how)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages that must not be imported."""
    folder = tmp_path_factory.mktemp("imports")
    for name in ("torch", "numpy", "jaxtyping", "matplotlib", "rich"):
        (folder / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")
    return folder


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("persample --version", 0, f"persample {start.VERSION}"),
        ("fngd --version", 0, f"fngd {start.VERSION}, part of the distribution persample"),
        ("persample --help", 0, "conformance"),
        ("persample compare --help", 0, "{mlp,cnn,transformer}"),
        ("persample report --help", 0, "FILE.py"),
        ("fngd compare --help", 0, "ResNet-110 with BatchNorm"),
        ("fngd inspect --help", 0, "--layers"),
        ("persample compare --model gpt", 2, "invalid choice: 'gpt'"),
        ("persample conformance --nothing", 2, "unrecognized arguments: --nothing"),
        ("fngd compare --optimizers sgd,adam", 2, "'adam' is unknown; choose from sgd"),
        ("fngd inspect --optimizer adam", 2, "'adam' is unknown; choose from"),
        ("fngd inspect --alpha 0", 2, "it must be > 0"),
        ("fngd compare --data-dir .", 2, "name the data set too"),
        ("fngd demo --seconds 0", 2, "it must be > 0"),
        ("benchmarks --version", 0, f"benchmarks {start.VERSION}, part of the distribution persample"),
        ("benchmarks --help", 0, "bag of words"),
        ("benchmarks --models gpt", 2, "gpt: choose from mlp"),
        ("benchmarks check", 2, "the following arguments are required: FILE.json"),
        ("experiments --version", 0, f"experiments {start.VERSION}, part of the distribution persample"),
        ("experiments --help", 0, "correlation matrices of early and late layers"),
        ("experiments pinn --scale huge", 2, "invalid choice: 'huge'"),
        ("experiments draw pin", 2, "pin: unknown; the experiments are correlation"),
    ],
)
def test_options_are_read_without_torch(words: str, code: int, told: str, without_torch: Path) -> None:
    done = run(*words.split(), path=without_torch)
    assert done.returncode == code, done.stderr
    assert told in " ".join((done.stdout + done.stderr).split())


def test_after_its_options_a_command_has_every_name(tmp_path: Path) -> None:
    """The file is run by the command: it sees the packages as any other program does."""
    (tmp_path / "mine.py").write_text(
        "import torch, persample, fngd, fngd.training\n"
        "from persample.backends import register\n"
        "for package in (persample, fngd, fngd.training):\n"
        "    assert all(hasattr(package, name) for name in package.__all__), package\n"
        "assert persample.backends()[0] == 'outputs'\n"
        "model = torch.nn.Linear(3, 2)\n"
    )
    done = run("persample", "report", str(tmp_path / "mine.py"))
    assert done.returncode == 0, done.stderr
    assert "Linear" in done.stdout


def test_only_our_commands_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_waiting", [])
    monkeypatch.setattr(start, "_finished", [])
    for argv, original, waits in (
        (["-m", "--help"], ["python", "-m", "persample", "--help"], True),
        (["-m", "compare"], ["python", "-X", "dev", "-m", "fngd", "compare"], True),
        (["somewhere/benchmarks/__main__.py", "report"], ["python", "-um", "benchmarks", "report"], True),
        (["-m"], ["python", "-m", "persample.testing.measure"], False),
        (["-m", "persample"], ["python", "-m", "mine", "persample"], False),
        (["persample"], ["python", "mine.py", "persample"], False),
        (["-c"], ["python", "-c", "import persample"], False),
        ([""], ["python"], False),
        (["-m"], [], False),
        ([], ["python", "-m", "persample"], False),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", original)
        assert start.deferred("a package") is waits, original
    assert start._waiting == ["a package"] * 3
    monkeypatch.setattr(start, "_waiting", [])
    start.complete()
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fngd"])
    assert not start.deferred("a package that the command itself imports")


# --- versions ---------------------------------------------------------------------------------------------------


def test_the_version_is_one() -> None:
    assert persample.__version__ == fngd.__version__ == start.VERSION


@pytest.mark.parametrize("old", ["2.7.1+cu126", "2.6.0", "1.13.1"])
def test_an_old_torch_is_told(old: str) -> None:
    words = rf"needs torch 2\.8 or newer, and this is torch {re.escape(old)}: pip install --upgrade 'torch>=2\.8'"
    with pytest.raises(ImportError, match=words):
        start.check_torch(old)


@pytest.mark.parametrize("new", ["2.8.0", "2.13.0+cpu", "2.15.0.dev20261101", "3.0.0a0+git1234567", "main"])
def test_others_are_not(new: str) -> None:
    start.check_torch(new)


def test_an_old_torch_is_told_before_anything_of_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.5.1'\n")
    (tmp_path / "mine.py").write_text("import fngd\n")
    done = run("mine", path=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: persample {start.VERSION} needs torch 2.8 or newer, and this is torch 2.5.1:")


def test_options_of_unpack_are_left_unchecked_on_python_3_10() -> None:
    """There beartype refuses them; everything else of the function is checked as ever."""
    tree = ast.parse("def f(x: int, *, y: str = '', **options: Unpack[Options]) -> int: ...").body[0]
    assert ast.unparse(shapes.without_unpack(tree)).startswith("def f(x: int, *, y: str='', **options) -> int")
    tree = ast.parse("def f(**options: int): ...").body[0]
    assert "options: int" in ast.unparse(shapes.without_unpack(tree))


# --- what is printed -------------------------------------------------------------------------------------------


def calls() -> list[tuple[str, ast.Call]]:
    folders = ("persample", "fngd", "benchmarks", "experiments")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


def test_rich_reads_no_markup_anywhere() -> None:
    """It would eat shapes such as [B, T]: every console is that of `command_line`, and progress columns say so too."""
    consoles = [place for place, call in calls() if call.func.id == "Console"]
    assert [place.partition(":")[0] for place in consoles] == ["persample/testing/command_line.py"]
    for place, call in calls():
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if call.func.id == "TextColumn":
            assert options.get("markup") == "False", place
