"""Parameters that other operations change before they meet the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from persample.testing.cases.table import Built, Net, group, randn, regress

case = group("usage", "usage")
B, T, D = 3, 4, 5


def lin(inp: int = D, out: int = D, bias: bool = True) -> nn.Linear:
    """A linear layer, as most cases need one."""
    return nn.Linear(inp, out, bias=bias)


# Parameters that are changed before they meet the data.


@case()
def exp_and_softplus() -> Built:
    """Scales kept positive."""
    model = Net(lambda m, x: x * m.a.exp() + F.softplus(m.b), a=randn(D), b=randn(T, D))
    return regress(model, randn(B, T, D))


@case()
def split_parameter() -> Built:
    """One fused matrix cut into three, used by three operations."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv.split([2, 2, D])
        return (F.linear(x, q) @ F.linear(x, k).mT).softmax(-1) @ F.linear(x, v)

    return regress(Net(run, qkv=randn(4 + D, D)), randn(B, T, D))


@case()
def chunked_activations() -> Built:
    """The same cut after the product: one use with several outputs downstream."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v

    return regress(Net(run, qkv=lin(D, 6)), randn(B, T, D))


@case()
def sliced_parameter_partly_unused() -> Built:
    """Rows of the table beyond the length get zero."""
    return regress(Net(lambda m, x: x + m.position[: x.shape[1]], position=randn(9, D)), randn(B, T, D))


@case()
def stacked_and_concatenated() -> Built:
    """Several small parameters joined to one weight and one bias."""

    def run(m: Net, x: Tensor) -> Tensor:
        return F.linear(x, torch.stack([m.a, m.b]), torch.cat([m.c, m.d]))

    return regress(Net(run, a=randn(D), b=randn(D), c=randn(1), d=randn(1)), randn(B, D))


@case()
def masked_weight() -> Built:
    """A causal mask on the weight, as in MADE."""
    return regress(Net(lambda m, x: F.linear(x, m.w.tril()), w=randn(D, D)), randn(B, D))


@case("float32")
def cast_weight() -> Built:
    """Through float32 and back, as mixed precision does; z carries float32 noise inside a float64 model."""
    model = Net(lambda m, x: m.b(F.linear(x.float(), m.a.weight.float()).double()), a=lin(bias=False), b=lin())
    return regress(model, randn(B, D))


@case()
def standardised_kernel() -> Built:
    """Weight standardisation (BiT): the kernel is normalised before each convolution."""

    def run(m: Net, x: Tensor) -> Tensor:
        return F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True), padding=1)

    return regress(Net(run, w=randn(3, 2, 3, 3)), randn(B, 2, 4, 5))


@case()
def weight_norm() -> Built:
    return regress(parametrizations.weight_norm(lin()), randn(B, T, D))


@case()
def weight_norm_of_a_convolution() -> Built:
    return regress(parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), randn(B, 2, 6))


@case("stateful", axes=None)
def spectral_norm_train() -> Built:
    """Each forward pass in training mode does a power iteration."""
    return regress(parametrizations.spectral_norm(lin()), randn(B, D))


@case()
def spectral_norm_eval() -> Built:
    return regress(parametrizations.spectral_norm(lin()).eval(), randn(B, D))


@case()
def orthogonal() -> Built:
    return regress(parametrizations.orthogonal(lin()), randn(B, D))


@case()
def hypernetwork_without_data() -> Built:
    """The weights of the layer are outputs of a network whose input is a parameter: all of it comes before
    the data.
    """
    model = Net(lambda m, x: F.linear(x, m.maker(m.code).view(D, D)), maker=lin(2, D * D), code=randn(2))
    return regress(model, randn(B, T, D))


@case()
def hypernetwork_per_sample() -> Built:
    """Every sample has its own weights, made from its own context."""
    model = Net(lambda m, x, c: torch.bmm(x, m.maker(c).view(-1, D, 2)), maker=lin(3, D * 2))
    return regress(model, (randn(B, T, D), randn(B, 3)))
