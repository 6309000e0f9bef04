"""`fngd.training.inspection` against per-sample gradients taken one by one, and its command."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fngd.__main__ import main
from fngd.training import inspect_command, inspection


def test_gram_matrices_are_those_of_single_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 9, 4), nn.Linear(4, 3)).double()
    images, labels = torch.randn(6, 1, 5, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    before = copy.deepcopy(model.state_dict())
    found = inspection.inspect(model, images, labels, alpha=0.1)
    assert list(found.grams) == ["0", "3", "4"]
    for layer, gram in found.grams.items():
        own = list(model.get_submodule(layer).parameters())
        losses = F.cross_entropy(model(images), labels, reduction="none")
        rows = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, own, retain_graph=True)])
                            for loss in losses])  # fmt: skip
        torch.testing.assert_close(gram, rows @ rows.T)
        torch.testing.assert_close(inspection.cosines(gram), F.normalize(rows) @ F.normalize(rows).T)
        expected = 0.1 * torch.linalg.matrix_norm(rows @ rows.T).item()
        assert found.diagnostics[layer]["damping"] == pytest.approx(expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_likeness():
    torch.manual_seed(0)
    rows = torch.randn(8, 5)
    gram = rows @ rows.T
    lengths = torch.rand(8) + 0.5  # lengths of gradients make no difference
    assert inspection.likeness(gram, gram * lengths * lengths[:, None]) == pytest.approx(1, abs=1e-5)
    other = 2 * torch.eye(8) - inspection.cosines(gram)
    assert inspection.likeness(gram, other) == pytest.approx(-1, abs=1e-5)


def test_a_sample_without_a_gradient_is_like_no_other():
    gram = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert inspection.cosines(gram).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="nothing to look at"):
        inspection.inspect(nn.Embedding(3, 2), torch.tensor([0, 1]), torch.tensor([0, 1]))


def test_the_command_writes_picture_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ["--epochs", "1", "--train-size", "64", "--batch-size", "16", "--layers", "0,9", "--out", str(tmp_path)]
    assert main(["inspect", *options]) == 0
    content = json.loads((tmp_path / "inspect.json").read_text())
    assert list(content["diagnostics"]) == ["0", "3", "7", "9"]
    assert content["likeness"]["3"]["3"] == pytest.approx(1)
    assert (tmp_path / "inspect.png").stat().st_size > 10_000
    assert "cnn on digits after 1 epochs with fngd, 16 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "0,nine"], "layers ['nine'] are none of those that were met: ['0', '3', '7', '9']"),
        (["--batch-size", "0"], "--batch-size: '0' is no whole number of at least 1"),
        (["--alpha", "0"], "--alpha: got 0; it must be > 0"),
        (["--data", "cifar10"], "--data-dir"),
        (["--epochs", "-1"], "no whole number"),
        (["--device", "toaster"], "--device toaster cannot be used"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], words: str):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "--epochs", "0", "--train-size", "64", "--out", str(tmp_path), *options])
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_layers_are_checked_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inspect_command, "_train", lambda *_: pytest.fail("it trained first"))
    with pytest.raises(SystemExit):
        main(["inspect", "--layers", "conv9", "--train-size", "20", "--out", str(tmp_path)])
    assert "layers ['conv9'] are none of those that were met: ['0', '3', '7', '9']" in capsys.readouterr().err


def test_the_name_of_a_layer_is_no_markup(capsys: pytest.CaptureFixture):
    figures = dict.fromkeys(inspect_command.COLUMNS, 1.0)
    found = inspection.Inspection({}, {"heads[red].0": figures}, torch.zeros(1).long())
    inspect_command._print(found, "mine [B, T]")
    printed = capsys.readouterr().out
    assert "heads[red].0" in printed
    assert "mine [B, T]" in printed
