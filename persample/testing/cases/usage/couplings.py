"""Models and losses in which samples interact: to be refused by name, or read as the tag ``separable``
allows.

Their neighbours that look coupled and are not are here too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.table import Built, Net, group, randn, regress, squared

case = group("coupling", "usage")
B, T, D = 4, 3, 5


def lin(out: int = D) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(D, out)


@case("peers", coupled=True)
def batch_norm_train() -> Built:
    return regress(nn.Sequential(lin(), nn.BatchNorm1d(D), nn.ReLU(), lin()), randn(B, D))


@case("peers", coupled=True)
def batch_norm_train_after_convolution() -> Built:
    return regress(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), randn(B, 2, 5, 5))


@case("peers", coupled=True)
def batch_norm_train_frozen_affine() -> Built:
    """The norm has no trainable parameter, so a check of module types sees nothing; the layer below is
    coupled.
    """
    return regress(nn.Sequential(lin(), nn.BatchNorm1d(D).requires_grad_(False), lin(2)), randn(B, D))


@case("separable", coupled=True)
def batch_norm_train_under_everything() -> Built:
    """On the inputs, frozen: nothing trainable is below it, and above it rows belong to samples."""
    return regress(nn.Sequential(nn.BatchNorm1d(D).requires_grad_(False), lin(), nn.Tanh(), lin(2)), randn(B, D))


@case("peers")
def batch_norm_eval_between_layers() -> Built:
    """Evaluation mode uses running statistics: not coupled."""
    return regress(nn.Sequential(lin(), nn.BatchNorm1d(D), nn.ReLU(), lin()).eval(), randn(B, D))


@case(coupled=True)
def batch_statistics_by_hand() -> Built:
    """A mean over axis 0 without any norm module."""
    return regress(Net(lambda m, x: m.a(x) - m.a(x).mean(0), a=lin()), randn(B, D))


@case("separable", coupled=True)
def batch_mean_detached() -> Built:
    """The mean is a constant to autograd: values couple, gradients do not."""
    return regress(Net(lambda m, x: m.a(x) - m.a(x).mean(0).detach(), a=lin()), randn(B, D))


@case(coupled=True)
def softmax_over_the_batch() -> Built:
    return regress(Net(lambda m, x: m.b(m.a(x).softmax(0)), a=lin(), b=lin(2)), randn(B, D))


@case(coupled=True)
def attention_over_the_batch() -> Built:
    """Time-major inputs read as batch-first by mistake: samples attend to each other."""
    attention = nn.MultiheadAttention(D - 1, 2, batch_first=False)
    return regress(Net(lambda m, x: m.attention(x, x, x)[0], attention=attention), randn(B, T, D - 1))


@case(coupled=True)
def recurrence_over_the_batch() -> Built:
    """A layer in time-major mode fed [B, T, D]: each sample's state continues the one before."""
    return regress(Net(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(D, 2)), randn(B, T, D))


@case(coupled=True)
def minibatch_standard_deviation() -> Built:
    """A feature of the whole batch given to every sample (StyleGAN's discriminator)."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(torch.cat([h, h.std(0, correction=0).mean().expand(len(h), 1)], 1))

    return regress(Net(run, a=lin(), b=nn.Linear(D + 1, 2)), randn(B, D))


@case(coupled=True)
def neighbours_in_the_batch() -> Built:
    """Mixup inside the model, after the first layer: two samples in every row."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(0.7 * h + 0.3 * h.roll(1, 0))

    return regress(Net(run, a=lin(), b=lin(2)), randn(B, D))


@case("separable", coupled=True)
def neighbours_by_two_calls() -> Built:
    """The same values by two calls of the layer: each row of each call has a part in one loss only."""
    model = Net(lambda m, x: m.b(0.7 * m.a(x) + 0.3 * m.a(x).roll(1, 0)), a=lin(), b=lin(2))
    return regress(model, randn(B, D))


@case("separable", coupled=True)
def mixup_of_the_inputs() -> Built:
    """Mixed before any parameter: each row still has one loss."""
    return regress(Net(lambda m, x: m.a(0.7 * x + 0.3 * x.roll(1, 0)), a=lin()), randn(B, D))


@case(coupled=True)
def one_pair_of_samples() -> Built:
    """Only the last two samples touch, all others are alone."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x).tanh()
        return m.b(torch.cat([h[:-1], h[-1:] + h[-2:-1]]))

    return regress(Net(run, a=lin(), b=lin(2)), randn(B, D))


@case(coupled=True)
def faint_coupling() -> Built:
    """One part in 10⁴ of the batch mean: too much for an exact method, easily lost in a tolerance."""
    return regress(Net(lambda m, x: m.b(m.a(x).tanh() + 1e-4 * m.a(x).mean(0)), a=lin(), b=lin(2)), randn(B, D))


@case(coupled=True)
def loss_normalised_over_the_batch() -> Built:
    """Each loss divided by the sum of all."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin(2)), randn(B, D))
    return model, lambda o, t: squared(o, t) / squared(o, t).sum(), x, y


@case("separable", coupled=True, axes=None)
def loss_normalised_by_a_constant_of_the_batch() -> Built:
    """Each loss divided by the detached sum of all."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin(2)), randn(B, D))
    return model, lambda o, t: squared(o, t) / squared(o, t).sum().detach(), x, y


@case(axes=None)
def mean_over_the_batch_left_to_the_loss() -> Built:
    """Each loss divided by B: not coupled, but sample b alone has another divisor."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin(2)), randn(B, D))
    return model, lambda o, t: squared(o, t) / len(t), x, y


@case(coupled=True)
def ranking_loss() -> Built:
    """Each sample against all others of the batch."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin(1)), randn(B, D))
    return model, lambda o, t: F.softplus((o - o.T) * (t < t.T)).sum(1), x, y


@case(coupled=True)
def in_batch_negatives() -> Built:
    """A contrastive loss: the other samples' keys are the wrong answers."""

    def loss(outputs: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        scores = outputs[0] @ outputs[1].T
        return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")

    model = Net(lambda m, q, k: (m.a(q), m.b(k)), a=lin(), b=lin())
    return model, loss, (randn(B, D), randn(B, D)), randn(B)


@case(coupled=True)
def experts_with_capacity() -> Built:
    """Tokens beyond an expert's capacity are dropped, so a sample's output depends on who came before it.
    Weights by the share of the batch carry gradient, as load balancing does.
    """

    def run(m: Net, x: Tensor) -> Tensor:
        gate = m.gate(x).softmax(-1)
        return m.a(x) * gate[:, :1] / gate[:, :1].mean(0)

    return regress(Net(run, gate=lin(2), a=lin()), randn(B, D))


@case()
def sum_over_the_batch_of_what_is_shared() -> Built:
    """A mean over rows that are all the same parameter: looks like coupling, holds no sample."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.a(x) + m.shift.expand(len(x), -1).mean(0)

    return regress(Net(run, a=lin(), shift=randn(D)), randn(B, D))


@case()
def difference_of_equal_samples_cancels() -> Built:
    """Coupling by a factor of zero is none."""
    return regress(Net(lambda m, x: m.a(x) + 0.0 * m.a(x).mean(0), a=lin()), randn(B, D))
