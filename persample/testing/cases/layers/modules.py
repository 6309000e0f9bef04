"""Layers alone: linear, convolution, embedding and normalisation, one line a case, named after how they are
built.

Most lines are the ones that other per-sample-gradient suites test, the rest the options that they forget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from persample.testing.cases.table import Built, Net, add, group, ids, randn, regress

case = group("layer", "layer")


def _brief(value: Any) -> str:
    return str(value).replace(" ", "") if not isinstance(value, type) else value.__name__


def layer(
    shape: tuple[int, ...] | Tensor,
    make: type[nn.Module],
    *args: Any,
    tags: tuple[str, ...] = (),
    train: bool = True,
    coupled: bool = False,
    below: tuple[Any, ...] = (),
    **options: Any,
) -> None:
    """Add a case of one layer on normal inputs of this shape, or on these inputs; ``below``: another, in
    front.
    """
    how = ",".join([*map(_brief, args), *(f"{k}={_brief(v)}" for k, v in options.items())])
    at = ",".join(map(str, shape if isinstance(shape, tuple) else shape.shape))
    under = f"{below[0].__name__}-" if below else ""
    name = f"layer/{under}{make.__name__}({how})@{at}" + ("" if train else " eval")

    def build() -> Built:
        first = [below[0](*below[1:]), nn.Tanh()] if below else []
        module = make(*args, **options)
        model = nn.Sequential(*first, module) if below else module
        return regress(model.train(train), randn(*shape) if isinstance(shape, tuple) else shape.clone())

    add(name, build, "layer", *tags, coupled=coupled)


peers = ("peers",)

# Linear: inputs of 1 to 5 axes, the input itself with or without a graph behind it.
layer((3, 10), nn.Linear, 10, 7)
layer((3, 4, 5), nn.Linear, 5, 3)
layer((3, 4, 2, 5), nn.Linear, 5, 3, tags=peers)
layer((3, 4, 2, 3, 5), nn.Linear, 5, 3)
layer((12, 7), nn.Linear, 7, 3, bias=False)
layer((1, 4), nn.Linear, 4, 3)
layer((2, 1), nn.Linear, 1, 1)
layer((0, 4), nn.Linear, 4, 3, tags=("empty", "peers"))
layer((0, 2, 4), nn.Linear, 4, 3, tags=("empty",))
layer((3, 0, 4), nn.Linear, 4, 3, tags=("zero",))
layer((3, 2, 4), nn.Linear, 4, 3, below=(nn.Linear, 4, 4))

# Convolutions: (in, out, kernel, stride, padding, dilation, groups).
layer((3, 3, 7), nn.Conv1d, 3, 2, 2)
layer((3, 2, 7), nn.Conv1d, 2, 3, 2, 2, 0, 2)
layer((3, 3, 8), nn.Conv1d, 3, 6, 2, 4, 2, groups=3)
layer((3, 3, 7), nn.Conv1d, 3, 9, 2, padding=1, groups=3, bias=False)
layer((3, 4, 7), nn.Conv1d, 4, 8, 2, padding=1, groups=4, bias=False)
layer((3, 2, 9), nn.Conv1d, 2, 3, 4, padding="same", tags=peers)
layer((3, 2, 9), nn.Conv1d, 2, 3, 4, padding="same", dilation=2)
layer((3, 2, 9), nn.Conv1d, 2, 3, 3, padding="valid", stride=2)
layer((3, 3, 7, 7), nn.Conv2d, 3, 2, 2)
layer((3, 3, 8, 8), nn.Conv2d, 3, 6, 2, 4, 2, groups=3)
layer((3, 6, 7, 7), nn.Conv2d, 6, 9, 2, dilation=2, groups=3, tags=peers)
layer((4, 8, 11, 13), nn.Conv2d, 8, 15, (3, 5), (2, 1), (4, 2), (3, 1), bias=False)
layer((1, 1, 8, 1), nn.Conv2d, 1, 1, (3, 1), dilation=(3, 1), bias=False)
layer((3, 2, 6, 7), nn.Conv2d, 2, 3, (2, 4), padding="same", tags=peers)
layer((3, 2, 6, 7), nn.Conv2d, 2, 4, (3, 2), padding="same", dilation=(1, 2), groups=2)
layer((3, 2, 6, 5), nn.Conv2d, 2, 3, 1)
layer((3, 2, 6, 5), nn.Conv2d, 2, 3, 1, stride=2, bias=False)
layer((3, 2, 6, 5), nn.Conv2d, 2, 3, (6, 5))
layer((3, 4, 6, 5), nn.Conv2d, 4, 4, 3, padding=1, groups=4)
layer((3, 2, 8, 7), nn.Conv2d, 2, 3, 3, stride=3, padding=1)
layer((0, 2, 5, 5), nn.Conv2d, 2, 3, 3, tags=("empty", "peers"))
layer((1, 2, 5, 5), nn.Conv2d, 2, 3, 3)
layer((3, 2, 6, 5), nn.Conv2d, 2, 3, 3, padding=1, below=(nn.Conv2d, 2, 2, 1))
layer((3, 3, 2, 7, 7), nn.Conv3d, 3, 2, 2)
layer((3, 3, 5, 4, 4), nn.Conv3d, 3, 6, 2, groups=3)
layer((3, 2, 5, 6, 7), nn.Conv3d, 2, 4, 2, stride=2, padding=1, groups=2, bias=False)
for mode in ("reflect", "replicate", "circular"):
    layer((3, 2, 7), nn.Conv1d, 2, 3, 3, padding=2, padding_mode=mode, tags=peers)
    layer((3, 2, 6, 7), nn.Conv2d, 2, 3, 3, padding=(1, 2), padding_mode=mode, tags=peers)
    layer((3, 2, 6, 7), nn.Conv2d, 2, 2, (2, 3), padding="same", padding_mode=mode, groups=2)
    layer((2, 2, 4, 5, 4), nn.Conv3d, 2, 3, 2, padding=(1, 0, 2), padding_mode=mode)

# Transposed: (in, out, kernel, stride, padding, output_padding, groups, bias, dilation).
layer((3, 2, 9), nn.ConvTranspose1d, 2, 3, 2, stride=3, dilation=5, tags=peers)
layer((3, 6, 7), nn.ConvTranspose1d, 6, 9, 2, dilation=2, groups=3, tags=peers)
layer((3, 2, 5), nn.ConvTranspose1d, 2, 3, 3, stride=2, padding=1, output_padding=1)
layer((3, 4, 7, 7), nn.ConvTranspose2d, 4, 6, 2, dilation=2, groups=2)
layer((3, 2, 4, 5), nn.ConvTranspose2d, 2, 3, (3, 2), (2, 3), (1, 0), (1, 2), bias=False, tags=peers)
layer((3, 4, 4, 5), nn.ConvTranspose2d, 4, 4, 3, stride=2, padding=1, output_padding=1, groups=4)
layer((3, 2, 3, 5, 5), nn.ConvTranspose3d, 2, 3, 2, stride=2, padding=2, dilation=2)
layer((2, 4, 2, 3, 2), nn.ConvTranspose3d, 4, 2, 2, stride=2, output_padding=1, groups=2)

# Folding convolutions into matrices by hand, patch embeddings, pixel shuffles are in ``vision``.

# Embeddings; the repeated ids within a sample and across samples are meant.
layer(torch.tensor([0, 4, 2, 4, 0, 1]), nn.Embedding, 5, 3)
layer(torch.tensor([[[0, 1], [2, 2]], [[0, 0], [0, 0]], [[1, 0], [2, 1]], [[2, 1], [1, 2]]]), nn.Embedding, 3, 5)
layer(torch.tensor([[1, 1, 0, 3], [3, 2, 2, 2], [1, 0, 3, 1]]), nn.Embedding, 4, 3, padding_idx=1, tags=peers)
layer(torch.tensor([[1, 1, 0, 3], [3, 2, 2, 2], [1, 0, 3, 1]]), nn.Embedding, 4, 3, padding_idx=-1)
layer(torch.tensor([[1, 1], [1, 1]]), nn.Embedding, 3, 2, padding_idx=1, tags=("zero",))
layer(torch.tensor([[1, 0, 3], [3, 2, 2]]), nn.Embedding, 4, 3, max_norm=1.0, tags=("stateful",))
layer(
    torch.tensor([[1, 1, 0, 3], [3, 2, 2, 2], [1, 0, 3, 1]]),
    nn.Embedding,
    4,
    3,
    scale_grad_by_freq=True,
    coupled=True,
    tags=("separable",),
)
layer(torch.tensor([[1, 1, 0, 3], [3, 2, 2, 2], [1, 0, 3, 1]]), nn.Embedding, 4, 3, sparse=True)
for mode in ("sum", "mean", "max"):
    layer(torch.tensor([[1, 1, 0, 3], [3, 2, 2, 2], [1, 0, 3, 1]]), nn.EmbeddingBag, 4, 3, mode=mode, tags=peers)
    layer(torch.tensor([[1, 1, 0], [3, 2, 2]]), nn.EmbeddingBag, 4, 3, mode=mode, padding_idx=1)

_BAGS = (torch.tensor([1, 1, 0, 3, 2, 2, 2, 0]), torch.tensor([0, 3, 3, 5]))  # the second bag is empty


def _one_bag(inputs: tuple[Tensor, ...], b: int) -> tuple[Tensor, ...]:
    flat, offsets, *weights = inputs
    ends = [*offsets.tolist(), len(flat)]
    inside = slice(ends[b], ends[b + 1])
    return (flat[inside], offsets[:1], *(w[inside] for w in weights))


for mode in ("sum", "mean", "max"):

    @case("peers", name=f"EmbeddingBag(4,3,mode={mode})@offsets", axes=_one_bag)
    def _(mode: str = mode) -> Built:
        """Bags of a flat list of ids given by offsets: with a repeated id, and one bag empty."""
        return regress(nn.EmbeddingBag(4, 3, mode=mode), _BAGS)


@case(
    "peers",
    name="EmbeddingBag(4,3,mode=sum)@weights",
    axes=lambda i, b: {k: v[b : b + 1] for k, v in i.items()},
)
def _() -> Built:
    """A weight for each id."""
    bag = nn.EmbeddingBag(4, 3, mode="sum")
    return regress(bag, {"input": torch.tensor([[1, 1, 0], [3, 2, 2]]), "per_sample_weights": randn(2, 3)})


@case("peers", name="EmbeddingBag(4,3,mode=sum)@offsets,weights", axes=_one_bag)
def _() -> Built:
    """Bags by offsets, a weight for each id."""
    run = Net(lambda m, i, o, w: m.bag(i, o, per_sample_weights=w), bag=nn.EmbeddingBag(4, 3, mode="sum"))
    return regress(run, (*_BAGS, randn(8)))


@case(name="EmbeddingBag(4,3,include_last_offset)@offsets", axes=None)
def _() -> Built:
    """The offsets end with the length of the list."""
    bag = nn.EmbeddingBag(4, 3, mode="mean", include_last_offset=True)
    return regress(bag, (_BAGS[0], torch.tensor([0, 3, 5, 8])))


# Normalisations.
layer((3, 5), nn.LayerNorm, 5)
layer((3, 4, 5), nn.LayerNorm, 5)
layer((3, 4, 5), nn.LayerNorm, (4, 5))
layer((3, 2, 4, 5), nn.LayerNorm, (2, 4, 5))
layer((3, 2, 4, 5), nn.LayerNorm, 5)
layer((3, 4, 5), nn.LayerNorm, 5, bias=False, tags=peers)
layer((3, 4, 5), nn.LayerNorm, 5, below=(nn.Linear, 5, 5))
layer((3, 5), nn.RMSNorm, 5)
layer((3, 4, 5), nn.RMSNorm, (4, 5))
layer((3, 2, 4, 5), nn.RMSNorm, (2, 4, 5), eps=1e-3)
layer((3, 4, 5), nn.RMSNorm, 5, below=(nn.Linear, 5, 5))
for groups in (1, 2, 4):
    layer((3, 4, 5), nn.GroupNorm, groups, 4)
    layer((3, 4, 3, 2), nn.GroupNorm, groups, 4)
layer((3, 4), nn.GroupNorm, 2, 4)
layer((3, 4, 3, 2), nn.GroupNorm, 2, 4, below=(nn.Conv2d, 4, 4, 1))
layer((3, 4, 5), nn.InstanceNorm1d, 4, affine=True)
layer((3, 4, 5, 3), nn.InstanceNorm2d, 4, affine=True)
layer((3, 4, 2, 3, 2), nn.InstanceNorm3d, 4, affine=True)
layer((3, 4, 5, 3), nn.InstanceNorm2d, 4, affine=True, track_running_stats=True)
layer((3, 4, 5, 3), nn.InstanceNorm2d, 4, affine=True, track_running_stats=True, train=False, tags=peers)
layer((3, 4, 5, 3), nn.InstanceNorm2d, 4, affine=True, below=(nn.Conv2d, 4, 4, 1))
layer((5, 7), nn.BatchNorm1d, 7, train=False, tags=peers)
layer((5, 7, 4), nn.BatchNorm1d, 7, train=False, tags=peers)
layer((5, 7, 3, 4), nn.BatchNorm2d, 7, train=False, tags=peers)
layer((5, 7, 3, 4, 2), nn.BatchNorm3d, 7, train=False, tags=peers)
layer((3, 4, 3, 2), nn.BatchNorm2d, 4, train=False, below=(nn.Conv2d, 4, 4, 1))
for train in (True, False):
    for affine in (True, False):
        layer(
            (3, 4, 3, 2),
            nn.BatchNorm2d,
            4,
            track_running_stats=train,
            affine=affine,
            train=train,
            coupled=True,
            below=(nn.Conv2d, 4, 4, 1),
            tags=peers,
        )
layer((5, 7), nn.BatchNorm1d, 7, coupled=True, tags=("separable", "peers"))
layer((5, 7, 4), nn.BatchNorm1d, 7, coupled=True, tags=("separable", "peers"))

# The rest of torch.nn with parameters.
layer((3, 5), nn.PReLU)
layer((3, 4, 5), nn.PReLU, 4)
layer((3, 4, 2, 3), nn.PReLU, 4, below=(nn.Conv2d, 4, 4, 1))


@case(name="Bilinear(2,3,4)@3,2|3,3")
def _() -> Built:
    return regress(nn.Bilinear(2, 3, 4), (randn(3, 2), randn(3, 3)))


@case(name="Bilinear(2,3,4,bias=False)@3,5,2|3,5,3")
def _() -> Built:
    return regress(nn.Bilinear(2, 3, 4, bias=False), (randn(3, 5, 2), randn(3, 5, 3)))


@case(name="AdaptiveLogSoftmaxWithLoss(6,9,[2,5])@4,6", axes=None)
def _() -> Built:
    """Clusters of rare classes: which rows a tail's weights meet depends on the targets."""
    model = nn.AdaptiveLogSoftmaxWithLoss(6, 9, [2, 5])
    return model, lambda outputs, _: -outputs.output, (randn(4, 6), torch.tensor([0, 8, 3, 6])), ids(1, 4)


@case(name="LazyLinear(4)@3,2,5")
def _() -> Built:
    """Materialised by the first forward pass."""
    return regress(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3)), randn(3, 2, 5))
