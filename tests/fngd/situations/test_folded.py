"""Optimisers on models that fold frames, windows or views into the batch: the directions of B samples, not of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folding import Frames, Siamese, Swin
from natural import close, dense
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from fngd import EKFAC, FNGD, KFAC, MBF, NGD, SKFAC, Eva

pytestmark = pytest.mark.usefixtures("double")

B, ALPHA = 4, 1e-2


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]] = {
    "frames": (Frames, ((B, 3, 2, 4, 4),), 2),
    "windows": (Swin, ((B, 2, 4, 4),), 3),
    "views": (Siamese, ((B, 1, 4), (B, 1, 4)), 5),
}


def rows(model: nn.Module, inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """By layer, U [N, B] of each sample's own loss; from the other half of the library."""
    grads = persample.per_sample(model, losses, inputs, targets).grads()
    layers: dict[str, list[Tensor]] = {}
    for name, row in grads.items():
        layers.setdefault(name.rpartition(".")[0], []).append(row.flatten(1))
    return {path: torch.cat(parts, 1).T for path, parts in layers.items()}


def vectors(model: nn.Module) -> dict[str, Tensor]:
    result: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        result.setdefault(name.rpartition(".")[0], []).append(parameter.grad.flatten())
    return {path: torch.cat(parts) for path, parts in result.items()}


@pytest.mark.parametrize("scale", ["absorb", "graft"])
@pytest.mark.parametrize("gram", ["layer", "network"])
@pytest.mark.filterwarnings("ignore:zero_grad.. of the optimiser follows:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_directions_are_the_dense_ones(name: str, gram: str, scale: str) -> None:
    build, shapes, classes = MODELS[name]
    model, inputs, y = build(), tuple(torch.randn(shape) for shape in shapes), torch.randint(classes, (B,))
    own = rows(model, inputs, y)
    opt = FNGD(model, lr=0.1, momentum=0.0, alpha=ALPHA, gram=gram, scale=scale, steps_per_epoch=1)
    blocks = [list(own)] if gram == "network" else [[path] for path in own]
    for _ in range(2):  # the coefficients of the first pass, and the stored ones
        opt.zero_grad()
        F.cross_entropy(model(*inputs), y).backward()
        got = vectors(model)
        for block in blocks:
            u = torch.cat([own[path] for path in block])
            expected = dense(u, u.mean(1), lam=ALPHA * (u.T @ u).norm(), scale=scale)
            close(torch.cat([got[path] for path in block]), expected)
    assert {why for why in opt.explain().values() if "rows" in why or "times" in why}


def test_accumulated_directions_are_those_of_the_joined_batch() -> None:
    model, single = Frames(), Frames()
    single.load_state_dict(model.state_dict())
    x, y = torch.randn(2 * B, 3, 2, 4, 4), torch.randint(2, (2 * B,))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "alpha": ALPHA, "reduction": "sum"}
    opt, whole = NGD(model, accumulate="joint", **options), NGD(single, **options)
    for part, targets in zip(x.split(3), y.split(3), strict=True):  # the last is shorter
        F.cross_entropy(model(part), targets, reduction="sum").backward()
    F.cross_entropy(single(x), y, reduction="sum").backward()
    for path, expected in vectors(single).items():
        close(vectors(model)[path], expected)
    opt.step()
    whole.step()


class Lifted(nn.Module):
    """`Frames` with the frames as an axis of space and of positions, so that nothing is folded."""

    def __init__(self, of: Frames) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1), stride=(1, 2, 2))
        self.mix = nn.Conv3d(2, 2, (1, 2, 2), bias=False, groups=2)
        self.up = nn.ConvTranspose3d(3, 2, (1, 2, 2), stride=(1, 2, 2))
        self.project, self.head = nn.Linear(2, 4), nn.Linear(4, 2)
        state = of.state_dict()
        self.load_state_dict({name: value.view_as(self.get_parameter(name)) for name, value in state.items()})

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.up(self.conv(x.transpose(1, 2)).tanh())).tanh().mean((3, 4))
        return self.head(self.project(h.mT).tanh().mean(1))


METHODS: dict[str, Callable[..., Any]] = {
    "FNGD": lambda model: FNGD(model, lr=0.1, alpha=ALPHA, steps_per_epoch=2),
    "NGD, improved": lambda model: NGD(model, lr=0.1, alpha=ALPHA, fisher="improved", kl_clip=1e-3),
    "KFAC": lambda model: KFAC(model, lr=0.1),
    "EKFAC": lambda model: EKFAC(model, lr=0.1),
    "MBF": lambda model: MBF(model, lr=0.1),
    "SKFAC": lambda model: SKFAC(model, lr=0.1),
    "SKFAC, subsampled": lambda model: SKFAC(model, lr=0.1, positions="subsample", keep=10**6),
    "Eva": lambda model: Eva(model, lr=0.1),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_steps_as_on_the_model_that_folds_nothing(name: str) -> None:
    folded = Frames()
    folded.up.requires_grad_(name in ("FNGD", "NGD, improved"))  # the others refuse transposed convolutions
    lifted = Lifted(folded)
    lifted.up.requires_grad_(folded.up.weight.requires_grad)
    opts = [METHODS[name](model) for model in (folded, lifted)]
    for step in range(4):
        torch.manual_seed(step % 2)
        x, y = torch.randn(B, 3, 2, 4, 4), torch.randint(2, (B,))
        for model, opt in zip((folded, lifted), opts, strict=True):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        for key, value in folded.named_parameters():
            other = lifted.get_parameter(key).view_as(value)
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=f"{key} in step {step}")
