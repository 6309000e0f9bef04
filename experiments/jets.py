"""Derivatives of a network by its inputs, carried forward through its layers (Taylor mode), and hard constraints.

    symbol      meaning                                                        shape
    orders      highest derivative by each input, (1, 2) for u, u_t, u_x, u_xx
    jet         value and derivatives along each input; none are mixed         [B, C, W], C = 1 + Σ orders
    u           offset + envelope · network(features)                          [B, C, outputs]

Every layer is used once, on C channels, where nested `torch.autograd.grad` uses it once a derivative and doubles the
graph each time. What does not depend on parameters, the jets of features, envelope and offset, is computed once for
each set of points. A boundary or initial condition that envelope and offset hold needs no residuals of its own.

Composition with a scalar function by Faà di Bruno's formula: y' = f'x', y'' = f''x'² + f'x'',
y''' = f'''x'³ + 3f''x'x'' + f'x'''; products by Leibniz' rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]
"""Points [B, n] -> [B, W], made of torch's differentiable operations."""
HIGHEST = 3


def network(inputs: int, hidden: Sequence[int], outputs: int = 1) -> nn.Sequential:
    """A tanh network in float64, its weights drawn by Glorot's rule and its biases zero."""
    layers: list[nn.Module] = []
    for inp, out in pairwise((inputs, *hidden, outputs)):
        linear = nn.Linear(inp, out, dtype=torch.float64)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Prepared:
    """Jets at one set of points that no parameter changes; offset and envelope are None where there is none."""

    points: Tensor
    features: Tensor
    envelope: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class Field:
    """u = offset + envelope · network(features) of points.

    >>> net = network(1, (5,))
    >>> wave = Field(net, orders=(2,), envelope=lambda x: 1 - x**2)
    >>> u, u_x, u_xx = wave(wave.prepare(torch.tensor([[1.0], [0.3]], dtype=torch.float64))).unbind(1)
    >>> u[0].item()
    0.0
    """

    net: nn.Sequential
    orders: tuple[int, ...]
    features: Function = lambda points: points
    envelope: Function | None = None
    offset: Function | None = None

    def prepare(self, points: Tensor, orders: tuple[int, ...] | None = None) -> Prepared:
        """The constant jets at points [B, n]; of other orders than the field's where they are given."""

        def jet(function: Function | None) -> Tensor | None:
            return None if function is None else constant_jet(function, points, orders or self.orders)

        return Prepared(points, constant_jet(self.features, points, orders or self.orders), jet(self.envelope),
                        jet(self.offset))  # fmt: skip

    def __call__(self, at: Prepared, orders: tuple[int, ...] | None = None) -> Tensor:
        """The jet of u, [B, C, outputs], with its graph."""
        orders = orders or self.orders
        jet = at.features
        for layer in self.net:
            jet = tanh(jet, orders) if isinstance(layer, nn.Tanh) else _linear(layer, jet)
        if at.envelope is not None:
            jet = product(at.envelope, jet, orders)
        return jet if at.offset is None else jet + at.offset

    def values(self, points: Tensor) -> Tensor:
        """u alone, [B, outputs]."""
        none = (0,) * len(self.orders)
        return self(self.prepare(points, none), none)[:, 0]


def _linear(layer: nn.Module, jet: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    out = jet @ layer.weight.T
    return torch.cat([out[:, :1] + layer.bias, out[:, 1:]], 1) if out.shape[1] > 1 else out + layer.bias


def slices(orders: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First channel and number of derivatives of each input."""
    place = 1
    for order in orders:
        yield place, order
        place += order


def tanh(jet: Tensor, orders: Sequence[int]) -> Tensor:
    """The jet of tanh(x) from that of x."""
    value = jet[:, 0].tanh()
    first = 1 - value.square()
    second = -2 * value * first if max(orders, default=0) > 1 else value
    third = first * (6 * value.square() - 2) if max(orders, default=0) > 2 else value
    parts = [value]
    for place, order in slices(orders):
        if order >= 1:
            x = jet[:, place]
            parts.append(first * x)
        if order >= 2:
            square, xx = x.square(), jet[:, place + 1]
            parts.append(second * square + first * xx)
        if order >= 3:
            parts.append(third * square * x + 3 * second * x * xx + first * jet[:, place + 2])
    return torch.stack(parts, 1)


def product(a: Tensor, b: Tensor, orders: Sequence[int]) -> Tensor:
    """The jet of a·b."""
    parts = [a[:, 0] * b[:, 0]]
    for place, order in slices(orders):
        x, y = ([jet[:, 0], *(jet[:, place + k] for k in range(order))] for jet in (a, b))
        for n in range(1, order + 1):
            parts.append(sum((comb(n, k) * x[k] * y[n - k] for k in range(1, n + 1)), x[0] * y[n]))
    return torch.stack(parts, 1)


def constant_jet(function: Function, points: Tensor, orders: Sequence[int]) -> Tensor:
    """The jet of a function at points by nested autograd, without its graph, [B, C, W]."""
    if max(orders, default=0) > HIGHEST:
        raise ValueError(f"orders={tuple(orders)}; derivatives up to {HIGHEST} are carried")
    with torch.enable_grad():
        x = points.detach().clone().requires_grad_()
        columns = []
        for value in function(x).unbind(1):
            column = [value]
            for axis, order in enumerate(orders):
                last = value
                for _ in range(order):
                    last = _derivative(last, x, axis)
                    column.append(last)
            columns.append(torch.stack(column, 1))
    return torch.stack(columns, 2).detach()


def _derivative(value: Tensor, x: Tensor, axis: int) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(value)
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True, allow_unused=True)
    return torch.zeros_like(value) if grad is None else grad[:, axis]
