"""PyTorch Lightning trains as a plain loop does, and goes on from its checkpoints bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from loops import METHODS, build_model, loader, plain_run, same_parameters
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed"),
    pytest.mark.filterwarnings("ignore"),  # its advice on workers and logging
]
EPOCHS = 3
NAMES = ("fngd", "ngd", "kfac", "skfac", "eva", "shampoo")


def module(name: str) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_model()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> dict[str, Any]:
            opt = METHODS[name](self.net)
            schedule = CosineAnnealingLR(opt, EPOCHS * len(loader()))
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def fit(module: Any, folder: Path, epochs: int = EPOCHS, start: str | None = None, **options: Any) -> Any:
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=start)
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_lightning_runs_as_a_plain_loop_does(name: str, tmp_path: Path) -> None:
    trained = module(name)
    fit(trained, tmp_path, enable_checkpointing=False)
    assert same_parameters(trained.net, plain_run(name, EPOCHS))


def test_lightning_accumulates_and_clips(tmp_path: Path) -> None:
    trained = module("fngd")
    fit(trained, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5, enable_checkpointing=False)
    assert same_parameters(trained.net, plain_run("fngd", EPOCHS, accumulate=2, clip=0.5))


@pytest.mark.parametrize("name", NAMES)
def test_lightning_goes_on_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    whole, first, second = (module(name) for _ in range(3))
    fit(whole, tmp_path, enable_checkpointing=False)
    fit(first, tmp_path, EPOCHS - 1).save_checkpoint(tmp_path / "last.ckpt")
    fit(second, tmp_path, start=str(tmp_path / "last.ckpt"))
    assert same_parameters(whole.net, second.net)
    assert not same_parameters(first.net, second.net)
