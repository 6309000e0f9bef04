"""`python -m persample report`: what it collects, that it tells no paths or names, and what each backend answers."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest

from persample.__main__ import main
from persample.testing import report
from persample.testing.start import VERSION

MODEL = """
import torch
from torch import nn

class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 0.123456), requires_grad=False)
        self.inner = nn.Linear(3, 3, bias=False)
    def forward(self, x):
        y = self.inner(x * self.scale)
        return y - y.mean({axis})

model = nn.Sequential(Centred(), nn.Tanh(), nn.Linear(3, 2))
"""
DATA = """
inputs, targets = torch.randn(5, 3), torch.randint(2, (5,))

def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")
"""


def written(folder: Path, axis: str, data: str = DATA) -> Path:
    path = folder / "mine.py"
    path.write_text(MODEL.replace("{axis}", axis) + data)
    return path


def test_versions_and_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    told = capsys.readouterr().out
    for words in (
        f"| persample | {VERSION} |",
        f"| python | {platform.python_version()} |",
        "| torch | ",
        "| cores | ",
    ):
        assert words in told
    assert "Layers" not in told
    for secret in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert secret not in told
    assert f" {getpass.getuser()} " not in told


@pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
def test_a_model_with_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers by type and shape and no value; samples that influence each other are refused."""
    assert main(["report", str(written(tmp_path, axis="0"))]) == 0
    told = capsys.readouterr().out
    for words in (
        "| 0 | Centred (own) | scale [3], frozen |",
        "| 0.inner | Linear | weight [3, 3] |",
        "| 1 | Tanh |  |",
        "| 2 | Linear | weight [2, 3]; bias [2] |",
        "| inputs | float32 [5, 3] |",
        "| targets | int64 [5] |",
        "| outputs | refused: CoupledSamplesError",
    ):
        assert words in told
    assert "0.1234" not in told
    assert str(tmp_path) not in told


@pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
def test_what_is_right_is_exact_and_what_is_wrong_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, axis="1, keepdim=True")
    assert main(["report", str(path)]) == 0
    assert "| outputs | exact: " in capsys.readouterr().out
    monkeypatch.setattr("persample.testing.conformance.deviation", lambda got, want: 1.0)
    assert main(["report", str(path)]) == 0
    assert "| outputs | wrong: 1.0e+00 |" in capsys.readouterr().out


def test_a_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(written(tmp_path, axis="0", data=""))]) == 0
    told = capsys.readouterr().out
    assert "| 2 | Linear |" in told
    assert "Backends were not tried: the file sets no loss_fn and no inputs." in told


def test_a_loop_that_fails_is_told_without_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"{DATA}\ninputs = torch.randn(5, 4)\ndef loss_fn(o, t):\n    raise OSError('no {tmp_path}/weights.pt')\n"
    assert main(["report", str(written(tmp_path, axis="0", data=data.replace("5, 4", "5, 3")))]) == 0
    assert "| the loop over samples | crash: OSError: no weights.pt |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("import nothing_of_the_kind", "failed: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("net = 3", "must set model to a torch.nn.Module; got nothing"),
        ("model = 3", "must set model to a torch.nn.Module; got int"),
    ],
)
def test_mistakes(content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    assert main(["report", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none.py")]) == 2
    assert "none.py failed: FileNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("/home/me/net.py, line 3", "net.py, line 3"),
        ("in '~/code/a b'", "in 'a b'"),
        (r"C:\Users\me\net.py", "net.py"),
        ("and/or a/b, 1/2 and [B, T]", "and/or a/b, 1/2 and [B, T]"),
    ],
)
def test_folders_are_left_out(words: str, left: str) -> None:
    assert report.without_paths(words) == left
