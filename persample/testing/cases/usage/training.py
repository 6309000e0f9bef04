"""What training scripts do: in-place operations, checkpoints, dropout, freezing, custom functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from persample.testing.cases.table import Built, Net, group, randn, regress

case = group("usage", "usage")
B, T, D = 3, 4, 5


def lin(inp: int = D, out: int = D, bias: bool = True) -> nn.Linear:
    """A linear layer, as most cases need one."""
    return nn.Linear(inp, out, bias=bias)


# Training as people do it.


@case("peers")
def in_place_relu() -> Built:
    return regress(nn.Sequential(lin(), nn.ReLU(inplace=True), lin()), randn(B, D))


@case("peers")
def in_place_relu_after_convolution() -> Built:
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.GroupNorm(1, 3), nn.ReLU(inplace=True))
    return regress(layers, randn(B, 2, 5, 6))


@case()
def in_place_arithmetic() -> Built:
    """add_, mul_ and writing into a slice, with parameters among the operands."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.lin(x)
        y += m.shift
        y[:, 0] = m.start
        return y.mul_(m.scale)

    return regress(Net(run, lin=lin(), shift=randn(D), start=randn(D), scale=randn(D)), randn(B, T, D))


@case("peers")
def checkpointed() -> Built:
    """checkpoint(use_reentrant=False): saved tensors are computed anew when they are read."""
    model = Net(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
        body=nn.Sequential(lin(), nn.Tanh(), lin()),
        head=lin(),
    )
    return regress(model, randn(B, T, D))


@case("random", axes=None)
def checkpointed_with_dropout() -> Built:
    model = Net(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
        body=nn.Sequential(lin(), nn.Dropout(0.5), lin()),
        head=lin(),
    )
    return regress(model, randn(B, D))


@case("random", axes=None)
def dropout() -> Built:
    return regress(nn.Sequential(lin(), nn.Dropout(0.5), nn.ReLU(), lin()), randn(B, T, D))


@case()
def frozen_first_layer() -> Built:
    """The output of the first layer has no graph."""
    model = nn.Sequential(lin().requires_grad_(False), nn.ReLU(), lin())
    return regress(model, randn(B, D))


@case()
def frozen_in_the_middle() -> Built:
    """Only a norm and the biases learn."""
    model = nn.Sequential(lin(), nn.LayerNorm(D), lin())
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return regress(model, randn(B, T, D))


@case()
def input_requires_grad() -> Built:
    """An input that is a leaf of the graph is no parameter."""
    return regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(B, D).requires_grad_())


@case("unused")
def unused_parameters() -> Built:
    """A branch never taken, and a parameter multiplied by zero."""
    model = Net(lambda m, x: m.used(x) + 0 * m.idle, used=lin(), never=lin(), idle=randn(D))
    return regress(model, randn(B, D))


@case("unused")
def used_by_some_samples_only() -> Built:
    """A branch for the samples of one kind: an index picks them."""

    def run(m: Net, x: Tensor, kind: Tensor) -> Tensor:
        y = m.common(x)
        return y.index_add(0, kind.nonzero()[:, 0], m.special(x[kind]))

    return regress(Net(run, common=lin(), special=lin(), never=lin()), (randn(B, D), torch.tensor([True, False, True])))


@case()
def detached_branch() -> Built:
    """A target network: one use counts, the other is detached."""
    return regress(Net(lambda m, x: m.lin(x) - m.lin(x.tanh()).detach(), lin=lin()), randn(B, D))


@case()
def no_grad_branch() -> Built:
    def run(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            code = m.a(x)
        return m.b(code) + m.a(x)

    return regress(Net(run, a=lin(), b=lin()), randn(B, D))


@case()
def gradient_inside_the_model() -> Built:
    """An energy model: the output is the derivative of a scalar by the input, so the graph holds backward
    nodes.
    """

    def run(m: Net, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():  # the builder looks at shapes without a graph
            energy = m.b(m.a(x).tanh()).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    return regress(Net(run, a=lin(), b=lin(D, 1)), randn(B, D))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x**3 * w

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 3 * z * x**2 * w, (z * x**3).sum_to_size(w.shape)


@case()
def custom_function() -> Built:
    """An autograd.Function with a parameter among its arguments: no rule can know it."""
    return regress(Net(lambda m, x: _Cube.apply(m.lin(x), m.w), lin=lin(), w=randn(D)), randn(B, D))


@case()
def sparse_adjacency() -> Built:
    """A constant sparse matrix beside the parameters."""
    graph = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.float64)
    model = Net(lambda m, x: torch.stack([torch.sparse.mm(graph.to_sparse(), s) for s in m.lin(x)]), lin=lin())
    return regress(model, randn(B, T, D))
