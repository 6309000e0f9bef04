"""What quantities cost on handwritten digits: time over that of a plain training step, measured in turns with it.

A plain step is a forward pass, a backward pass and SGD. "One sample at a time" is the loop over B backward passes, for
norms alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import persample
from persample.testing.machine import quiet
from persample.testing.measure import Ratio, paired_ratios

BATCH = 128
ROUNDS = 9
LOOP = "one sample at a time"


class RowsAsTokens(nn.Module):
    """A Transformer encoder of two layers that reads an image as a sequence of its rows, [B, 8, 8] -> [B, 10]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.places = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10]."""
        return self.head(self.body(self.rows(images) + self.places).mean(1))


def mlp() -> nn.Module:
    """64-512-512-512-10."""
    hidden = [part for _ in range(2) for part in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), *hidden, nn.Linear(512, 10))


def cnn() -> nn.Module:
    """Two convolutions with group normalisation."""
    body = [nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1)]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), *body, nn.GroupNorm(8, 64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "convolutions": cnn, "Transformer": RowsAsTokens}


@dataclass(frozen=True)
class Cost:
    """Times of one model: milliseconds of a plain step, and ratios to it by quantity."""

    model: str
    plain_ms: float
    ratios: dict[str, Ratio]


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, [B]."""
    return cross_entropy(outputs, targets, reduction="none")


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of one sample's gradient, all parameters together."""
    return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()


def digits(batch: int) -> tuple[Tensor, Tensor]:
    """The first of scikit-learn's handwritten digits: images [B, 8, 8] from 0 to 1, labels [B]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:batch], dtype=torch.float32) / 16, torch.tensor(data.target[:batch])


def costs(
    *, batch: int = BATCH, rounds: int = ROUNDS, progress: Callable[[str], None] = lambda text: None
) -> list[Cost]:
    """Returns what each model takes; `progress` is called with the name of each."""
    images, labels = digits(batch)
    found = []
    for name, build in MODELS.items():
        progress(name)
        torch.manual_seed(0)
        with quiet():
            found.append(_cost(name, build(), images, labels, rounds))
    return found


def _cost(name: str, model: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> Cost:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def plain() -> None:
        optimizer.zero_grad()
        losses(model(images), labels).mean().backward()
        optimizer.step()

    def quantity(call: str, *values: Any) -> Callable[[], object]:
        return lambda: getattr(persample.per_sample(model, losses, images, labels), call)(*values)

    def loop() -> Tensor:
        parameters = list(model.parameters())
        each = losses(model(images), labels)
        return torch.stack([norm(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in each])

    candidates = {
        "norms()": quantity("norms"),
        "gram()": quantity("gram"),
        "clipped_sum()": quantity("clipped_sum", 1.0),
    }
    ratios = paired_ratios(plain, candidates, rounds=rounds, warmup=3)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        plain()
        seconds.append(time.perf_counter() - start)
    slow = paired_ratios(plain, {LOOP: loop}, rounds=1, warmup=0)
    return Cost(name, 1e3 * statistics.median(seconds), {**ratios, **slow})
