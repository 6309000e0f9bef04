"""The networks of `python -m fngd compare`.

ResNets for 32 × 32 images are those of He et al. (2015, Section 4.2): 6n + 2 layers in three stages of 16,
32 and 64 channels, BatchNorm, and parameter-free shortcuts (their option A: every second pixel, new
channels zero). ResNet-18 and -34, made for larger images (their Table 1: four stages of 64 to 512 channels, shortcuts
of 1 × 1 convolutions), begin here with one 3 × 3 convolution, as is usual for 32 × 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, which has weights only where it is `projected` and the shape changes."""

    def __init__(self, inp: int, out: int, stride: int, *, projected: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.stride, self.extra = stride, out - inp
        self.shortcut: nn.Module | None = None
        if projected and (self.extra or stride != 1):
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Float[Tensor, "batch inp height width"]) -> Float[Tensor, "batch out h w"]:
        """Returns relu(shortcut(x) + convolutions(x))."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(y + x, inplace=True)


class ResNet(nn.Module):
    """A ResNet of 6n + 2 layers for 32 × 32 images.

    >>> ResNet(20)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, depth: int, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}; it must be 6n + 2 with n ≥ 1: 8, 14, 20, 32, 44, 56, 110, …")
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        inp = 16
        for out, first_stride in ((16, 1), (32, 2), (64, 2)):
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(inp, out, first_stride if index == 0 else 1))
                inp = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Returns logits."""
        x = self.blocks(F.relu(self.norm(self.conv(x)), inplace=True))
        return self.head(x.mean((2, 3)))


class WideResNet(nn.Module):
    """A ResNet of four stages, 64 to 512 channels wide, for 32 × 32 images; `blocks` are the blocks of each stage.

    >>> WideResNet((2, 2, 2, 2), classes=100)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 100])
    """

    def __init__(self, blocks: tuple[int, int, int, int], classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        layers: list[nn.Module] = []
        inp = 64
        for stage, count in enumerate(blocks):
            out = 64 * 2**stage
            for index in range(count):
                layers.append(BasicBlock(inp, out, 2 if stage and index == 0 else 1, projected=True))
                inp = out
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Returns logits."""
        x = self.blocks(F.relu(self.norm(self.conv(x)), inplace=True))
        return self.head(x.mean((2, 3)))


def small_cnn(size: int, channels: int, classes: int, width: int) -> nn.Module:
    """Returns two 3 × 3 convolutions, each followed by ReLU and 2 × 2 max pooling, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 4) ** 2, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, classes),
    )


def mlp(size: int, channels: int, classes: int, width: int = 128) -> nn.Module:
    """Returns two hidden layers of `width` with ReLU."""
    inputs = channels * size**2
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, classes),
    )  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model for images [channels, size, size] in `classes` classes, and the smallest size."""

    build: Callable[[int, int, int], nn.Module]
    smallest: int


MODELS = {
    "mlp": ModelSpec(mlp, 1),
    "cnn": ModelSpec(lambda s, c, k: small_cnn(s, c, k, 16), 4),
    "resnet20": ModelSpec(lambda s, c, k: ResNet(20, k, c), 16),
    "resnet32": ModelSpec(lambda s, c, k: ResNet(32, k, c), 16),
    "resnet110": ModelSpec(lambda s, c, k: ResNet(110, k, c), 16),
    "resnet18": ModelSpec(lambda s, c, k: WideResNet((2, 2, 2, 2), k, c), 16),
    "resnet34": ModelSpec(lambda s, c, k: WideResNet((3, 4, 6, 3), k, c), 16),
}


def build_model(name: str, *, size: int, channels: int, classes: int, seed: int = 0) -> nn.Module:
    """Returns a freshly initialised model; the same seed gives the same weights. Torch's random state is
    kept.

    Raises:
        ValueError: an unknown name, or images too small for the model.

    >>> model = build_model("cnn", size=8, channels=1, classes=10)
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; choose one of {list(MODELS)}")
    if size < MODELS[name].smallest:
        able = [other for other, spec in MODELS.items() if spec.smallest <= size]
        raise ValueError(
            f"model {name!r} needs images of {MODELS[name].smallest} pixels or more, these have {size}; "
            f"choose one of {able}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name].build(size, channels, classes)
