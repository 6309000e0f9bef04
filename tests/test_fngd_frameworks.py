"""Under torch.compile, Accelerate and Lightning a run is the same as in a plain loop."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import METHODS, STEPS_PER_EPOCH, build_model, data, deviation, gradients, same_parameters
from torch import Tensor
from torch.nn import functional as F

from fngd import FNGD, NGD


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about the shape checks that only tests install
@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("fngd", "aot_eager"),
        ("ngd", "eager"),
        pytest.param("fngd", "eager", marks=pytest.mark.slow),
        pytest.param("ngd", "aot_eager", marks=pytest.mark.slow),
        *(
            pytest.param(name, backend, marks=pytest.mark.slow)
            for name in ("kfac", "skfac", "eva", "shampoo")
            for backend in ("eager", "aot_eager")
        ),
    ],
)
def test_torch_compile(method: str, backend: str) -> None:
    first, (x, y) = build_model(), data()
    second = copy.deepcopy(first)
    torch._dynamo.reset()
    compiled = torch.compile(second, backend=backend)
    opts = [METHODS[method](net) for net in (first, second)]
    for _ in range(STEPS_PER_EPOCH + 2):  # computed and stored coefficients
        for call, opt in zip((first, compiled), opts, strict=True):
            opt.zero_grad()
            F.cross_entropy(call(x), y).backward()
            opt.step()
    assert deviation(dict(second.named_parameters()), dict(first.named_parameters())) < 1e-4
    assert deviation(gradients(second), gradients(first)) < 1e-3
    torch._dynamo.reset()


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
