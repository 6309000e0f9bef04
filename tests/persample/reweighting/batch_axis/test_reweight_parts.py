"""reweight: models that call a layer on parts of the batch, sample by sample, or on crops and siblings of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from passes import MODES, B, Mode, same, squares, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import persample
from persample.reweighting import reweight

pytestmark = pytest.mark.usefixtures("double")

two_modes = pytest.mark.parametrize("mode", [MODES[1], MODES[2]], ids=["apart-gram", "joint-fixed"])

Call = Callable[[nn.Module, Tensor], Tensor]
"""(layer, x) → output, which holds the samples of x in the same order."""


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Two samples at a time, their positions one after another: as many rows as there are samples, with two each."""
    return torch.cat([layer(two.flatten(0, 1)).unflatten(0, (2, -1)) for two in x.split(2)])


def _by_length(layer: nn.Module, x: Tensor) -> Tensor:
    """Each sample alone, and as long as it is."""
    rows = [layer(each[: 1 + number % 2]) for number, each in enumerate(x)]
    return torch.stack([F.pad(each, (0, 0, 0, 2 - len(each))) for each in rows])


def _crops(layer: nn.Module, x: Tensor) -> Tensor:
    """All of the batch, and a crop of half of it."""
    first, rest = layer(x), layer(x[:2, :2]).sum(1)
    return torch.cat([first[:2] + rest[:, None], first[2:]])


def _siamese(layer: nn.Module, x: Tensor) -> Tensor:
    """A batch and its mirror image, in one call, of which the halves are compared."""
    one, other = layer(torch.cat([x, x.flip(1)])).chunk(2)
    return one * other.sum(1, keepdim=True)


PARTS: dict[str, Call] = {
    "chunk": lambda layer, x: torch.cat([layer(part) for part in x.chunk(2)]),
    "chunks of unequal size": lambda layer, x: torch.cat([layer(part) for part in x.split(3)]),
    "sizes": lambda layer, x: torch.cat([layer(part) for part in x.split_with_sizes([1, 2, 1])]),
    "slices": lambda layer, x: torch.cat([layer(x[at : at + 2]) for at in range(0, len(x), 2)]),
    "in another order": lambda layer, x: torch.cat([layer(x[2:]), layer(x[:2])][::-1]),
    "sample by sample": lambda layer, x: torch.stack([layer(each) for each in x]),
    "of one": lambda layer, x: torch.cat([layer(x[b : b + 1]) for b in range(len(x))]),
    "alone, joined with an axis": lambda layer, x: torch.cat([layer(each)[None] for each in x.unbind()]),
    "two by two rows": _rows,
    "each as long as it is": _by_length,
    "twice": lambda layer, x: torch.cat([layer(layer(part).tanh()) for part in x.chunk(2)]),
    "crops": _crops,
    "siamese": _siamese,
    "stacked and viewed": lambda layer, x: torch.stack([layer(part) for part in x.chunk(2)]).view(x.shape),
    "token by token": lambda layer, x: torch.stack([torch.stack([layer(each) for each in sample]) for sample in x]),
    "time first": lambda layer, x: torch.cat([layer(part.transpose(0, 1)).transpose(0, 1) for part in x.chunk(2)]),
    "checkpoint": lambda layer, x: torch.cat([checkpoint(layer, part, use_reentrant=False) for part in x.chunk(2)]),
}


class Parts(nn.Module):
    def __init__(self, call: Call, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.call, self.layer = call, nn.Linear(3, 3) if layer is None else layer

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


@two_modes
@pytest.mark.parametrize("length", [2, B, 5])
@pytest.mark.parametrize("name", PARTS)
def test_layers_called_on_parts_of_the_batch(name: str, length: int, mode: Mode) -> None:
    model, x = Parts(PARTS[name]), torch.randn(B, length, 3)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


IMAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Call]] = {
    "chunk": (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 5, 4), PARTS["chunk"]),
    "alone": (lambda: nn.Conv1d(2, 3, 2), (2, 5), PARTS["sample by sample"]),
    "alone, transposed": (lambda: nn.ConvTranspose1d(2, 3, 2), (2, 5), PARTS["sample by sample"]),
    "crops of other sizes": (
        lambda: nn.Conv1d(2, 3, 2), (2, 6), lambda layer, x: torch.cat([layer(x[:2])[..., :3], layer(x[2:, :, :4])])
    ),
    "frames": (
        lambda: nn.Conv2d(2, 2, 2), (3, 2, 4, 4),
        lambda layer, x: torch.cat([layer(p.flatten(0, 1)).unflatten(0, (2, 3)) for p in x.chunk(2)]),
    ),
    "volumes": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3), PARTS["chunk"]),
}  # fmt: skip


@two_modes
@pytest.mark.parametrize("name", IMAGES)
def test_convolutions_called_on_parts_of_the_batch(name: str, mode: Mode) -> None:
    build, shape, call = IMAGES[name]
    model, x = Parts(call, build()), torch.randn(B, *shape)
    expected = mode.expected(model, squares(model(x)), {"layer": ["layer.weight", "layer.bias"]})
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


def _written(layer: nn.Module, x: Tensor) -> Tensor:
    """Into slices of what is there already, of which the graph does not say where they are."""
    output = torch.zeros_like(x)
    for at in range(0, len(x), 2):
        output[at : at + 2] = layer(x[at : at + 2])
    return output


def _rows_of_all(layer: nn.Module, x: Tensor) -> Tensor:
    """As many tokens at a time as there are samples: three of one, and one of the next."""
    return torch.cat([layer(rows) for rows in x.flatten(0, 1).split(len(x))]).view(x.shape)


REFUSED: dict[str, tuple[Call, int]] = {
    "written into slices": (_written, B),
    "every second": (lambda layer, x: torch.stack([layer(x[::2]), layer(x[1::2])], 1).flatten(0, 1), B),
    "in the wrong order": (lambda layer, x: torch.cat([layer(x[2:]), layer(x[:2])]), B),
    "tokens of all": (_rows_of_all, 3),
    "reentrant checkpoint": (
        lambda layer, x: torch.cat([checkpoint(layer, part, use_reentrant=True) for part in x.chunk(2)]), B
    ),
}  # fmt: skip


@two_modes
@pytest.mark.parametrize("name", REFUSED)
def test_parts_of_which_nothing_is_proven_are_not_read_by_their_size(name: str, mode: Mode) -> None:
    """One axis has as many entries as there are samples, and counts others."""
    call, length = REFUSED[name]
    model, x = Parts(call), torch.randn(B, length, 3, requires_grad=name == "reentrant checkpoint")
    with mode.on(model), pytest.raises(ValueError, match="cannot tell which axis of layer 'layer' counts samples"):
        step(model, lambda: squares(model(x)))


class Siblings(nn.Module):
    """Two layers, each for one half of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2)
        return torch.cat([self.left(left), self.right(right)])


@two_modes
@pytest.mark.parametrize("length", [2, B])
def test_layers_for_halves_of_the_batch(length: int, mode: Mode) -> None:
    """The others' gradients are zero: the policy is asked about all samples."""
    model, x = Siblings(), torch.randn(B, length, 3)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        same(step(model, lambda: squares(model(x))), expected)


def test_other_batches_and_shapes() -> None:
    model, call = Parts(PARTS["chunk"]), PARTS["chunk"]
    with reweight(model, lambda layer, grads: torch.arange(1.0, 1 + grads.batch_size)):
        for batch, length in ((4, 4), (6, 4), (4, 6), (6, 6), (1, 6), (4, 4)):
            x, copy = torch.randn(batch, length, 3), copied(model.layer)
            losses = squares(call(copy, x)) * torch.arange(1.0, 1 + batch)
            losses.sum().backward()
            torch.testing.assert_close(step(model, lambda x=x: squares(model(x)))["layer.weight"], copy.weight.grad)


def copied(layer: nn.Module) -> nn.Module:
    copy = nn.Linear(3, 3)
    copy.load_state_dict(layer.state_dict())
    return copy


def test_known_factors_and_what_is_explained() -> None:
    model, x, c = Parts(PARTS["chunk"]), torch.randn(B, B, 3), torch.rand(B)
    rows = persample.per_sample(model, lambda output, _: squares(output), x).grads()["layer.weight"]
    model.zero_grad()
    with reweight(model, lambda layer, grads: None, known=lambda layer, batch, device: c) as handle:
        squares(model(x)).sum().backward()
        assert handle.explain() == {"layer": "reweighted, called on parts of the batch"}
    torch.testing.assert_close(model.layer.weight.grad, torch.tensordot(c, rows, 1))
