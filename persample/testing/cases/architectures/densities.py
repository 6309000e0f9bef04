"""Models of densities: autoencoders, flows, diffusion, critics."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from persample.testing.cases.parts import dense
from persample.testing.cases.table import Built, Net, add, group, randn, regress, squared

case = group("architecture", "architecture")
B, T, D = 3, 4, 6


# Density models, fields, loops.


@case()
def variational_autoencoder() -> Built:
    """The noise comes as an input; the loss is reconstruction plus divergence."""

    def run(m: Net, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        mean, log_var = m.encoder(x).chunk(2, 1)
        return m.decoder(mean + (log_var / 2).exp() * noise), mean, log_var

    def loss(outputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        out, mean, log_var = outputs
        return squared(out, x) + 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)

    x = randn(B, D)
    return Net(run, encoder=dense(D, 5, 4), decoder=dense(2, 5, D)), loss, (x, randn(B, 2)), x


@case()
def normalising_flow() -> Built:
    """Affine couplings and their log-determinants; a triangular matrix; scales by exp."""

    def run(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = m.log_scale.sum()
        x = x @ (m.mix.tril(-1) + torch.eye(D, dtype=x.dtype)) * m.log_scale.exp()
        for net in m.nets:
            a, b = x.chunk(2, 1)
            s, t = net(a).chunk(2, 1)
            x, volume = torch.cat([b * s.tanh().exp() + t, a], 1), volume + s.tanh().sum(1)
        return x, volume

    model = Net(run, mix=randn(D, D), log_scale=randn(D), nets=nn.ModuleList(dense(3, 5, 6) for _ in range(2)))
    return model, lambda out, _: squared(out[0], torch.zeros_like(out[0])) - out[1], randn(B, D), randn(B)


@case("random", axes=None)
def diffusion() -> Built:
    """Noise and time drawn inside the model, time embedded by sinusoids and FiLM."""

    def run(m: Net, x: Tensor) -> Tensor:
        t, noise = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
        scale, shift = m.time(torch.cat([t.sin(), t.cos()], 1)).chunk(2, 1)
        h = m.inp((1 - t).sqrt() * x + t.sqrt() * noise) * (1 + scale) + shift
        return m.out(F.silu(h)) - noise

    model = Net(run, time=dense(2, 5, 10), inp=nn.Linear(D, 5), out=nn.Linear(5, D))
    return model, lambda out, _: out.square().sum(1), randn(B, D), randn(B)


@case("unused")
def mixture_density() -> Built:
    """Log-likelihood of a mixture; a learned constant is left out."""
    model = Net(lambda m, x: m.body(x), body=dense(D, 5, 9), idle=randn(2))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        weight, mean, log_scale = out.chunk(3, 1)
        each = -0.5 * ((y - mean) / log_scale.exp()).square() - log_scale
        return -torch.logsumexp(weight.log_softmax(1) + each, 1)

    return model, loss, randn(B, D), randn(B, 1)


@case()
def gradient_penalty() -> Built:
    """A critic with the norm of its derivative by the input: gradients through a backward pass."""

    def run(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            score = m.critic(x)
            slope = torch.autograd.grad(score.sum(), x, create_graph=True)[0]
        return score[:, 0], (slope.norm(dim=1) - 1).square()

    model = Net(run, critic=dense(D, 5, 1))
    return model, lambda out, side: side * out[0] + 10 * out[1], randn(B, D), randn(B)


@case("stateful", axes=None)
def spectral_normed_critic() -> Built:
    """In training mode, as in a GAN."""
    model = nn.Sequential(
        spectral_norm(nn.Conv2d(2, 4, 3)), nn.LeakyReLU(0.2), nn.Flatten(), spectral_norm(nn.Linear(24, 1))
    )
    return regress(model, randn(B, 2, 4, 5))


@case("peers")
def weight_normed_net() -> Built:
    model = nn.Sequential(weight_norm(nn.Conv1d(2, 4, 3)), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(16, 3)))
    return regress(model, randn(B, 2, 6))


def codebook(straight: bool) -> Built:
    """A vector-quantised autoencoder: the nearest entry of a codebook, losses on both sides of a detach."""

    def run(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.encoder(x)
        nearest = torch.cdist(h, m.book).argmin(1)
        q = m.book[nearest]
        cost = (q - h.detach()).square().sum(1) + (h - q.detach()).square().sum(1)
        return m.decoder(h + (q - h).detach() if straight else q), cost

    model = Net(run, encoder=dense(D, 5, 3), book=randn(4, 3), decoder=dense(3, 5, D))
    x = randn(B, D)
    return model, lambda out, y: squared(out[0], y) + out[1], x, x


for straight in (True, False):
    title = "straight-through" if straight else "table-only"
    add(
        f"architecture/vector quantisation, {title}",
        partial(codebook, straight),
        "architecture",
        "routing",
    )
