"""The models that are measured, each with its loss and a random batch.

Nothing in them is chosen to hinder other libraries: no in-place operation after a layer, no bare parameters, no
learned positions, no module that is called twice. `full` are the sizes of the results, `tiny` those of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0


@dataclass(frozen=True)
class Task:
    """A model with one batch; `loss_fn(outputs, targets)` returns one loss for each sample."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.inputs.shape[0]

    @staticmethod
    def loss_fn(outputs: Tensor, targets: Tensor) -> Float[Tensor, " batch"]:
        """Cross-entropy of each sample, the mean over its positions."""
        losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        return losses.view(targets.shape[0], -1).mean(1)

    def losses(self) -> Float[Tensor, " batch"]:
        """One forward pass."""
        return self.loss_fn(self.model(self.inputs), self.targets)

    def to(self, device: str) -> Task:
        """The task on a device."""
        return Task(self.model.to(device), self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class ModelSpec:
    """How to build a task, in two sizes."""

    make: Callable[..., Task]
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]
    couples: bool = False
    """Batch normalisation: samples have no gradients of their own, only optimiser steps are measured."""


@dataclass(frozen=True)
class Problem:
    """Names a task so that a fresh process can build the same one."""

    name: str
    size: str = "full"
    device: str = "cpu"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Instead of the sizes of the spec: batch, depth, …"""

    @property
    def spec(self) -> ModelSpec:
        """Its entry in `MODELS`."""
        return MODELS[self.name]

    def build(self) -> Task:
        """Returns the task: the same weights and data at every call; torch's random state is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self.spec.make(**{**getattr(self.spec, self.size), **self.changes}).to(self.device)


def mlp(*, batch: int, inputs: int, width: int, depth: int, classes: int) -> Task:
    """`depth` hidden layers with ReLU."""
    sizes = [inputs, *[width] * depth]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return Task(
        nn.Sequential(*layers, nn.Linear(width, classes)), torch.randn(batch, inputs), torch.randint(classes, (batch,))
    )


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(min(8, channels), channels) if kind == "group" else nn.BatchNorm2d(channels)


class Residual(nn.Module):
    """Two 3 × 3 convolutions with normalisation, and a shortcut of 1 × 1 where the shape changes."""

    def __init__(self, inp: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, out)
        changes = stride != 1 or inp != out
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), _norm(norm, out)) if changes else nn.Identity()
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "batch inp height width"]) -> Float[Tensor, "batch out h w"]:
        """relu(shortcut(x) + convolutions(x))."""
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(self.shortcut(x) + y)


def resnet(*, batch: int, widths: tuple[int, ...], blocks: int, image: int, norm: str, classes: int = 10) -> Task:
    """A residual network for small colour images: a stage of `blocks` blocks for each width."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), _norm(norm, widths[0]), nn.ReLU()]
    inp = widths[0]
    for stage, out in enumerate(widths):
        for index in range(blocks):
            layers.append(Residual(inp, out, 2 if stage and not index else 1, norm))
            inp = out
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inp, classes))
    return Task(model, torch.randn(batch, 3, image, image), torch.randint(classes, (batch,)))


class Attention(nn.Module):
    """Causal self-attention from two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Every position attends to itself and earlier ones."""
        batch, time, width = x.shape
        q, k, v = (part.view(batch, time, self.heads, -1).transpose(1, 2) for part in self.mix(x).split(width, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Layer(nn.Module):
    """Attention and a feed-forward network, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Two residual branches."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Positions(nn.Module):
    """Adds sinusoids."""

    table: Tensor

    def __init__(self, time: int, width: int) -> None:
        super().__init__()
        rates = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
        angles = torch.arange(time)[:, None] * rates
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """x plus the table."""
        return x + self.table


def transformer(*, batch: int, time: int, width: int, depth: int, heads: int, words: int) -> Task:
    """A causal language model, its output layer untied."""
    model = nn.Sequential(
        nn.Embedding(words, width),
        Positions(time, width),
        *(Layer(width, heads) for _ in range(depth)),
        nn.LayerNorm(width),
        nn.Linear(width, words),
    )
    return Task(model, torch.randint(words, (batch, time)), torch.randint(words, (batch, time)))


def waves(*, batch: int, length: int, width: int, classes: int = 10) -> Task:
    """Four 1-D convolutions, one of them dilated and one in groups."""
    w = width
    model = nn.Sequential(
        nn.Conv1d(2, w, 9, stride=2, padding=4), nn.GroupNorm(4, w), nn.ReLU(),
        nn.Conv1d(w, 2 * w, 5, stride=2, padding=2), nn.GroupNorm(4, 2 * w), nn.ReLU(),
        nn.Conv1d(2 * w, 2 * w, 3, padding=2, dilation=2), nn.GroupNorm(4, 2 * w), nn.ReLU(),
        nn.Conv1d(2 * w, 2 * w, 3, padding=1, groups=4), nn.GroupNorm(4, 2 * w), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * w, classes),
    )  # fmt: skip
    return Task(model, torch.randn(batch, 2, length), torch.randint(classes, (batch,)))


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch width"]:
        """[B, T, D] -> [B, D]."""
        return x.mean(1)


def words(*, batch: int, time: int, words: int, width: int, classes: int = 10) -> Task:
    """A bag of words: nearly all parameters are in the table."""
    model = nn.Sequential(
        nn.Embedding(words, width), Mean(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )
    inputs: Int[Tensor, "batch time"] = torch.randint(words, (batch, time))
    return Task(model, inputs, torch.randint(classes, (batch,)))


_RESNET20 = {"batch": 128, "widths": (16, 32, 64), "blocks": 3, "image": 32}
_RESNET18 = {"batch": 32, "widths": (64, 128, 256, 512), "blocks": 2, "image": 32}
_TINY_RESNET = {"batch": 4, "widths": (8, 16), "blocks": 1, "image": 8}
_TINY_TRANSFORMER = {"batch": 4, "time": 5, "width": 8, "depth": 1, "heads": 2, "words": 11}

MODELS = {
    "mlp": ModelSpec(
        mlp,
        {"batch": 128, "inputs": 784, "width": 1024, "depth": 2, "classes": 10},
        {"batch": 4, "inputs": 6, "width": 8, "depth": 2, "classes": 3},
    ),
    "resnet20": ModelSpec(
        resnet,
        {**_RESNET20, "norm": "group"},
        {**_TINY_RESNET, "norm": "group"},
    ),
    "resnet18": ModelSpec(
        resnet,
        {**_RESNET18, "norm": "group"},
        {**_TINY_RESNET, "norm": "group"},
    ),
    "transformer": ModelSpec(
        transformer,
        {"batch": 32, "time": 32, "width": 256, "depth": 4, "heads": 4, "words": 1000},
        _TINY_TRANSFORMER,
    ),
    "transformer_wide": ModelSpec(
        transformer,
        {"batch": 8, "time": 128, "width": 768, "depth": 2, "heads": 12, "words": 1000},
        _TINY_TRANSFORMER,
    ),
    "waves": ModelSpec(
        waves,
        {"batch": 64, "length": 1024, "width": 32},
        {"batch": 4, "length": 16, "width": 8},
    ),
    "words": ModelSpec(
        words,
        {"batch": 64, "time": 64, "words": 30_000, "width": 64},
        {"batch": 4, "time": 5, "words": 20, "width": 8},
    ),
    "resnet20_bn": ModelSpec(
        resnet,
        {**_RESNET20, "norm": "batch"},
        {**_TINY_RESNET, "norm": "batch"},
        couples=True,
    ),
    "resnet18_bn": ModelSpec(
        resnet,
        {**_RESNET18, "norm": "batch"},
        {**_TINY_RESNET, "norm": "batch"},
        couples=True,
    ),
}
