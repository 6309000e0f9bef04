"""Under torch.compile, Accelerate and Lightning a run is the same as in a plain loop."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import build_model, data, same_parameters
from torch import Tensor
from torch.nn import functional as F

from fngd import FNGD, NGD

COMPILED = Path(__file__).parent / "fngd_compiled.py"


@pytest.mark.parametrize("kind", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_torch_compile(kind: str) -> None:
    """Without the shape checks of conftest: users have none, and Dynamo cannot trace them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--noconftest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        kind,
        str(COMPILED),
    ]
    done = subprocess.run(command, cwd=COMPILED.parents[1], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate() -> None:
    import accelerate

    first, (x, y) = build_model(), data()
    second = copy.deepcopy(first)
    opt = NGD(first, lr=0.05)
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(first, opt)
    plain = NGD(second, lr=0.05)
    for _ in range(4):
        wrapped.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        wrapped.step()
        plain.zero_grad()
        F.cross_entropy(second(x), y).backward()
        plain.step()
    assert same_parameters(first, second)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and logging
def test_lightning(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_model()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return FNGD(self.net, lr=0.05, steps_per_epoch=2)

    module, second, (x, y) = Module(), build_model(), data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader)
    opt = FNGD(second, lr=0.05, steps_per_epoch=2)
    for _ in range(2):
        for part in (slice(0, 8), slice(8, 16)):
            opt.zero_grad()
            F.cross_entropy(second(x[part]), y[part]).backward()
            opt.step()
    assert same_parameters(module.net, second)
