"""The Trainer of Hugging Face transformers trains language models as a plain loop does, with every method."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import METHODS, same_parameters
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

pytestmark = [
    *(
        pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
        for name in ("transformers", "accelerate")
    ),
    pytest.mark.filterwarnings("ignore"),  # its advice on its own options
]
EPOCHS, BATCHES, BATCH, WORDS = 2, 3, 4, 40


def build_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, **sizes))


def sentences() -> list[dict[str, torch.Tensor]]:
    words = torch.randint(WORDS, (BATCHES * BATCH, 7), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": line, "labels": line} for line in words]


def trained(name: str, folder: Path, **options: Any) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return self.accelerator.prepare(DataLoader(sentences(), batch_size=BATCH))

    model = build_model()
    opt = METHODS[name](model)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, num_train_epochs=EPOCHS, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", max_grad_norm=0.5, **options,
    )  # fmt: skip
    schedule = CosineAnnealingLR(opt, EPOCHS * BATCHES)
    InOrder(model, arguments, train_dataset=sentences(), optimizers=(opt, schedule)).train()
    return model


def plain(name: str) -> nn.Module:
    model = build_model()
    opt = METHODS[name](model)
    schedule = CosineAnnealingLR(opt, EPOCHS * BATCHES)
    for _ in range(EPOCHS):
        for batch in DataLoader(sentences(), batch_size=BATCH):
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()
    return model


@pytest.mark.parametrize("name", ["fngd", "ngd", "kfac", "skfac", "eva", "shampoo"])
def test_trainer_runs_as_a_plain_loop_does(name: str, tmp_path: Path) -> None:
    assert same_parameters(trained(name, tmp_path), plain(name))


def test_trainer_with_checkpoints_in_the_model(tmp_path: Path) -> None:
    model = trained("fngd", tmp_path, gradient_checkpointing=True)
    for one, two in zip(model.parameters(), plain("fngd").parameters(), strict=True):
        torch.testing.assert_close(one, two)
