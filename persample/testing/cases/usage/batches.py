"""Batches of unusual size, type and structure, and losses that leave samples or positions out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persample.testing.cases.table import Built, Net, classify, cross_entropy, group, ids, randn, regress, squared

case = group("usage", "usage")
B, T, D = 3, 4, 5


def lin(inp: int = D, out: int = D, bias: bool = True) -> nn.Linear:
    """A linear layer, as most cases need one."""
    return nn.Linear(inp, out, bias=bias)


# Batches and losses.


@case("peers", "empty")
def batch_of_none() -> Built:
    return regress(nn.Sequential(lin(), nn.ReLU(), lin()), randn(0, D))


@case("empty")
def convolutions_on_a_batch_of_none() -> Built:
    return classify(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), lin(27, 4)), randn(0, 2, 5, 5))


@case()
def batch_of_one() -> Built:
    return regress(nn.Sequential(lin(), nn.LayerNorm(D), lin()), randn(1, T, D))


@case()
def all_samples_equal() -> Built:
    """Identical rows: no method may tell samples apart by their values."""
    model, loss_fn, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(1, T, D).repeat(B, 1, 1))
    return model, loss_fn, x, y[:1].repeat(B, 1, 1)


@case()
def sample_with_zero_gradient() -> Built:
    """A hinge loss: samples beyond the margin have losses of zero."""

    def hinge(score: Tensor, side: Tensor) -> Tensor:
        return (1 - side * score[:, 0]).clamp(min=0)

    last = lin(D, 1)
    last.bias.data.fill_(2.0)
    model = nn.Sequential(lin(), nn.Tanh(), last)
    return model, hinge, randn(4, D), torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)


@case()
def sample_of_weight_zero() -> Built:
    """Sample weights from outside, one of them zero."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(4, D))
    weights = torch.tensor([1.0, 0, 2, 0.5], dtype=torch.float64)
    return model, lambda o, t: squared(o, t["y"]) * t["w"], x, {"y": y, "w": weights}


@case("peers")
def ignored_positions() -> Built:
    """ignore_index, the mean over what is left of each sample; one sample is ignored altogether."""

    def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) / (targets != -100).sum(1).clamp(min=1)

    model, _, x, targets = classify(nn.Sequential(nn.Embedding(7, D), lin(D, 7)), ids(7, 4, T))
    targets[0, 2:] = targets[1] = -100
    return model, mean_loss, x, targets


@case()
def large_and_small_losses() -> Built:
    """Twelve orders of magnitude between the losses of a batch."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(4, T, D))
    scales = torch.tensor([1e-6, 1.0, 1e6, 1e-3], dtype=torch.float64)
    return model, lambda o, t: squared(o, t["y"]) * t["scale"], x, {"y": y, "scale": scales}


@case()
def saturated() -> Built:
    """Gradients near underflow at saturated units."""
    return regress(nn.Sequential(lin(), nn.Sigmoid(), lin()), 100 * randn(B, D))


@case()
def losses_of_an_auxiliary_head() -> Built:
    """Outputs in a nested dict, one of them used by the loss for a part of the positions only."""

    def run(m: Net, x: Tensor) -> dict:
        h = m.body(x).tanh()
        return {"main": m.head(h.mean(1)), "more": [{"aux": m.aux(h)}]}

    def loss(outputs: dict, targets: Tensor) -> Tensor:
        return squared(outputs["main"], targets) + outputs["more"][0]["aux"][:, 1].square().sum(1)

    return Net(run, body=lin(), head=lin(D, 2), aux=lin(D, 3)), loss, randn(B, T, D), randn(B, 2)


@case()
def dict_inputs() -> Built:
    model = Net(lambda m, *, left, right: m.a(left) + m.b(right), a=lin(), b=lin(2, D))
    return regress(model, {"left": randn(B, D), "right": randn(B, 2)})


@case(axes=({"x": 0, "pair": (0, 1)}, None))
def nested_inputs() -> Built:
    """Tensors in dicts in tuples, one with the batch on axis 1, and a scale shared by all samples."""
    model = Net(
        lambda m, d, s: m.a(d["x"]) * s + m.b(d["pair"][0]) + m.c(d["pair"][1]).transpose(0, 1).sum(1),
        a=lin(),
        b=lin(),
        c=lin(2, D),
    )
    return regress(model, ({"x": randn(B, D), "pair": (randn(B, D), randn(T, B, 2))}, randn()))


@case()
def integer_inputs() -> Built:
    """Pixels of type uint8, converted inside the model."""
    model = Net(lambda m, x: m.lin(x.to(torch.float64) / 255), lin=lin())
    return regress(model, ids(256, B, D).to(torch.uint8))


@case()
def non_contiguous_inputs() -> Built:
    """A transposed view, and every second column of another."""
    return regress(nn.Sequential(lin(), nn.ReLU(), lin()), randn(D, 2 * B).T[::2])


@case()
def channels_last() -> Built:
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model, loss_fn, x, y = regress(layers, randn(B, 2, 7, 6))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, loss_fn, x.to(memory_format=torch.channels_last), y


@case()
def expanded_input() -> Built:
    """One image for all samples, a stride of zero over the batch."""
    return regress(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), randn(1, 2, 5, 5).expand(B, -1, -1, -1))
