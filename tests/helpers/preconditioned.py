"""What the tests of KFAC, SKFAC, Eva and Shampoo share: drawn layers, their positions by hand, and a training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from checkpoints import reloaded
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Make = Callable[..., Any]


class Positions:
    """A layer with an input and targets; x, z by unfolding, sample by sample, with the loss's own gradients."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.targets = torch.randn_like(layer(x))

    def losses(self) -> Tensor:
        return 0.5 * (self.layer(self.x).tanh() - self.targets).square().flatten(1).sum(1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """(x [groups, N, T, inp (+ 1)], z [groups, N, T, out]), z of each sample's own loss."""
        layer, count = self.layer, len(self.x)
        with torch.no_grad():
            out = layer(self.x)
        out.requires_grad_()
        (0.5 * (out.tanh() - self.targets).square()).sum().backward()
        z = out.grad
        if isinstance(layer, nn.Linear):
            x, z, groups = self.x.reshape(count, 1, -1, layer.in_features), z.reshape(count, 1, -1, z.shape[-1]), 1
        else:
            groups = layer.groups
            padded = F.pad(self.x, [p for p in reversed(layer.padding) for _ in range(2)])
            for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
                padded = padded.unfold(2 + axis, (k - 1) * d + 1, s)[..., ::d]
            dims = len(layer.kernel_size)  # [N, in, *time, *kernel]
            time = padded.shape[2 : 2 + dims].numel()
            x = padded.movedim(1, 1 + dims).reshape(count, time, groups, -1).transpose(1, 2)
            z = z.flatten(2).mT.reshape(count, time, groups, -1).transpose(1, 2)
        x, z = x.transpose(0, 1), z.transpose(0, 1)
        if layer.bias is not None:
            x = torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)
        return x, z

    def mean_gradient(self) -> Tensor:
        """[groups, out, inp (+ 1)]."""
        x, z = self.rows()
        return torch.einsum("gbto,gbti->goi", z, x) / x.shape[1]

    def as_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        groups = getattr(self.layer, "groups", 1)
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
        return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, -1, 1)], -1)

    def step_direction(self, make: Make, *, reduction: str = "mean", lr: float = 1.0, **options: Any) -> Tensor:
        """What one step without momentum subtracts, as a matrix; with lr = 1 the direction."""
        optimizer = make(self.layer, lr=lr, momentum=0.0, reduction=reduction, kl_clip=None, **options)
        before = {name: p.detach().clone() for name, p in self.layer.named_parameters()}
        getattr(self.losses(), reduction)().backward()
        optimizer.step()
        optimizer.remove()
        moved = {name: before[name] - p.detach() for name, p in self.layer.named_parameters()}
        with torch.no_grad():
            for name, p in self.layer.named_parameters():
                p.copy_(before[name])
                p.grad = None
        return self.as_matrix(moved["weight"], moved.get("bias"))


@st.composite
def problems(draw: st.DrawFn, *, kinds: tuple[str, ...] = ("linear", "positions", "conv")) -> Positions:
    """Layers with drawn sizes in float64, batches of 1 to 6 samples."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    kind, bias, batch = draw(st.sampled_from(kinds)), draw(st.booleans()), draw(st.integers(1, 6))
    options: dict[str, Any] = {"bias": bias, "dtype": torch.float64}
    inp, out = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if kind != "conv":
        time = [draw(st.integers(2, 4).filter(lambda n: n != batch))] if kind == "positions" else []
        return Positions(nn.Linear(inp, out, **options), torch.randn(batch, *time, inp, dtype=torch.float64))
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size = [draw(st.integers(3, 5 if dims < 3 else 3)) for _ in range(dims)]
    kind_of = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2 if k == 2 else 1)) for k in kernel)
    layer = kind_of(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        dilation=dilation,
        groups=groups,
        **options,
    )
    return Positions(layer, torch.randn(batch, layer.in_channels, *size, dtype=torch.float64))


class Net(nn.Module):
    """A convolution, a linear layer with positions, one without, a normalisation and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.inner = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.inner(x)).tanh().mean(1) * self.scale)


def batch(number: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 2, 4, 3, generator=generator), torch.randint(3, (size,), generator=generator)


def train(model: nn.Module, optimizer: Any, numbers: range, scheduler: Any = None) -> None:
    for number in numbers:
        x, y = batch(number, 5 if number % 4 else 3)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def check_resume(make: Make, seed: int, steps: int = 12) -> None:
    """A run that is saved at a random step and goes on in a new model ends with the same bits."""
    at = int(torch.randint(1, steps, (), generator=torch.Generator().manual_seed(seed)))
    torch.manual_seed(seed)
    model = Net()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = make(model)
    train(model, whole, range(steps))

    first = Net()
    first.load_state_dict(start)
    optimizer = make(first)
    train(first, optimizer, range(at))
    weights, state = reloaded((first.state_dict(), optimizer.state_dict()))
    del first, optimizer
    second = Net()
    second.load_state_dict(weights)
    resumed = make(second)
    resumed.load_state_dict(state)
    train(second, resumed, range(at, steps))
    for name, value in model.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def check_bad_batch(make: Make, bad: float, kept: str = "_running") -> None:
    """A batch with a number that is not finite leaves everything kept of the layers as it was."""
    model = Net()
    optimizer = make(model)
    train(model, optimizer, range(1, 3))
    before = {layer: {k: v.clone() for k, v in state.items()} for layer, state in getattr(optimizer, kept).items()}
    x, y = batch(5)
    x[0, 0, 0, 0] = bad
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert before
    for layer, state in getattr(optimizer, kept).items():
        for name, value in state.items():
            assert torch.equal(value, before[layer][name]), (layer, name)


def check_accumulation(make: Make) -> None:
    """A batch in two backward passes of unequal size makes the step of the batch in one."""
    x, y = batch(0, 6)
    results = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        torch.manual_seed(0)
        opt = make(model := Net())
        for part in parts:
            (F.cross_entropy(model(x[part]), y[part]) * (part.stop - part.start) / 6).backward()
        opt.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        close(results[1][name], value, 1e-10)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    error = (got - expected).norm() / expected.norm().clamp_min(1e-300)
    assert error <= tolerance, f"relative deviation {error:.1e}"
