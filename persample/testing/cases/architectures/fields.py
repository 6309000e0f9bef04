"""Fields, operators and loops: the same weights used many times, or made before the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.parts import dense
from persample.testing.cases.table import Built, Net, group, randn, regress

case = group("architecture", "architecture")
B, T, D = 3, 4, 6


@case("complex")
def fourier_operator() -> Built:
    """FNO: complex weights on the lowest frequencies, beside a convolution of size 1."""

    def run(m: Net, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)
        kept = torch.einsum("bim,iom->bom", modes[..., :3], m.w)
        return m.conv(x) + torch.fft.irfft(F.pad(kept, (0, modes.shape[-1] - 3)), n=x.shape[-1])

    model = Net(run, w=torch.randn(2, 2, 3, dtype=torch.complex128), conv=nn.Conv1d(2, 2, 1))
    return regress(model, randn(B, 2, 8))


@case(axes=(0, 0))
def radiance_field() -> Built:
    """NeRF: rays × points with sine features, a skip, density composited along the ray."""
    points = 5

    def features(x: Tensor) -> Tensor:
        return torch.cat([x, *(f(x * 2.0**k) for k in range(2) for f in (torch.sin, torch.cos))], -1)

    def run(m: Net, origin: Tensor, direction: Tensor) -> Tensor:
        depth = torch.linspace(0.1, 1, points, dtype=origin.dtype)
        x = features((origin[:, None] + depth[:, None] * direction[:, None]).flatten(0, 1))
        h = m.b(torch.cat([m.a(x).relu(), x], 1)).relu()
        opacity = 1 - torch.exp(-F.softplus(m.density(h)).view(-1, points))
        through = torch.cumprod(torch.cat([torch.ones_like(opacity[:, :1]), 1 - opacity[:, :-1]], 1), 1)
        colour = m.colour(h).sigmoid().view(-1, points, 3)
        return ((opacity * through)[..., None] * colour).sum(1)

    model = Net(run, a=nn.Linear(15, D), b=nn.Linear(15 + D, D), density=nn.Linear(D, 1), colour=nn.Linear(D, 3))
    return regress(model, (randn(B, 3), randn(B, 3)))


@case("routing", axes=None)
def hash_grid() -> Built:
    """A table of features at hashed grid corners, interpolated: rows of all samples collide in the table."""

    def run(m: Net, x: Tensor) -> Tensor:
        corner = x.floor().long()[:, None] + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        share = (1 - (x[:, None] - corner).abs()).prod(-1, keepdim=True)
        row = (corner[..., 0] ^ corner[..., 1] * 265443) % 8
        return m.head((m.table[row] * share).sum(1))

    return regress(Net(run, table=randn(8, 3), head=dense(3, 5, 2)), 3 * torch.rand(B, 2, dtype=torch.float64))


@case()
def fixed_point_loop() -> Built:
    """One cell, eight times, with the input injected each time."""

    def run(m: Net, x: Tensor) -> Tensor:
        z = torch.zeros(len(x), D, dtype=x.dtype)
        for _ in range(8):
            z = torch.tanh(m.cell(z) + m.inject(x))
        return m.head(z)

    return regress(Net(run, cell=nn.Linear(D, D), inject=nn.Linear(4, D), head=nn.Linear(D, 2)), randn(B, 4))


@case()
def neural_ode() -> Built:
    """Four steps of Runge-Kutta of order four: sixteen uses of each layer, a learned final time."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = F.softplus(m.time) / 4
        for _ in range(4):
            a = m.f(x)
            b = m.f(x + h / 2 * a)
            c = m.f(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + m.f(x + h * c))
        return x

    return regress(Net(run, f=dense(4, D, 4), time=randn()), randn(B, 4))


@case()
def adaptive_number_of_steps() -> Built:
    """Each sample stops after its own number of steps; finished ones are masked."""

    def run(m: Net, x: Tensor, steps: Tensor) -> Tensor:
        for i in range(int(steps.max())):
            x = torch.where((steps > i)[:, None], m.cell(x).tanh(), x)
        return x

    return regress(Net(run, cell=nn.Linear(D, D)), (randn(B, D), torch.tensor([1, 3, 2])))


@case()
def hypernetwork_of_a_convolution() -> Built:
    """Kernels from an embedding of the layer's number, one generator for all layers, no data in it."""

    def run(m: Net, x: Tensor) -> Tensor:
        for code in m.codes.weight:
            x = F.conv2d(x, m.maker(code).view(2, 2, 3, 3), padding=1).tanh()
        return x

    return regress(Net(run, codes=nn.Embedding(2, 3), maker=dense(3, 5, 36)), randn(B, 2, 5, 4))


@case()
def spline_network() -> Built:
    """KAN: a learned function on every edge, as coefficients of Gaussian bumps."""

    def edge(m: Net, x: Tensor) -> Tensor:
        bumps = torch.exp(-(x[..., None] - torch.linspace(-1, 1, 4, dtype=x.dtype)).square())
        return torch.einsum("bik,oik->bo", bumps, m.w) + F.linear(F.silu(x), m.base)

    layers = [Net(edge, w=randn(o, i, 4), base=randn(o, i)) for i, o in ((D, 5), (5, 2))]
    return regress(nn.Sequential(*layers), randn(B, D))


@case()
def capsules() -> Built:
    """Predictions of capsules for capsules, agreed on in three rounds of routing."""

    def run(m: Net, x: Tensor) -> Tensor:
        votes = torch.einsum("bid,ijde->bije", x, m.w)
        logits = torch.zeros(votes.shape[:3], dtype=x.dtype)
        for _ in range(3):
            v = (logits.softmax(2)[..., None] * votes).sum(1)
            v = v * v.norm(dim=-1, keepdim=True) / (1 + v.square().sum(-1, keepdim=True))
            logits = logits + (votes * v[:, None]).sum(-1)
        return v

    return regress(Net(run, w=randn(4, 2, 3, 5)), randn(B, 4, 3))


@case()
def factor_tensor() -> Built:
    """A weight in tensor-train form: three cores contracted to a matrix before the data."""

    def run(m: Net, x: Tensor) -> Tensor:
        return x @ torch.einsum("iar,rjbs,skc->ijkabc", m.a, m.b, m.c).reshape(8, 8)

    return regress(Net(run, a=randn(2, 2, 3), b=randn(3, 2, 2, 3), c=randn(3, 2, 2)), randn(B, 8))


@case()
def reversible() -> Built:
    """Additive couplings, then their inverse: every block is used forwards and backwards."""

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        a = a + m.f(b)
        b = b + m.g(a)
        return torch.cat([a * 2 - m.f(b * 2), b], 1)

    return regress(Net(run, f=dense(3, 5, 3), g=dense(3, 5, 3)), randn(B, 6))
