"""What users bring to Gauss–Newton: networks, buffers, sharing, compilation, loops; each against dense rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from residuals import DAMPING, by_autograd, close, dense_direction, flat, network
from torch import Tensor, nn

from fngd import GaussNewton


def rows_of(params: list[Tensor], residuals: Tensor) -> tuple[Tensor, Tensor]:
    """J and s of one group, one backward pass for each row."""
    scaled = residuals / math.sqrt(len(residuals))
    rows = [flat(torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)) for value in scaled]
    return torch.stack(rows), scaled.detach()


class Fourier(nn.Module):
    """sin and cos of fixed frequencies, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 4).double())
        self.net = network(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ self.frequencies
        return self.net(torch.cat([phase.sin(), phase.cos()], 1))


class Sine(nn.Module):
    """SIREN's activation, with a frequency that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.tensor(2.0).double())
        self.first, self.last = nn.Linear(2, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(self.omega * self.first(x)))


class Tied(nn.Module):
    """One layer twice, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid, self.out = (nn.Linear(*size).double() for size in ((2, 4), (4, 4), (4, 1)))
        self.again = nn.Linear(4, 4).double()
        self.again.weight = self.mid.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mid(torch.tanh(self.inp(x))))
        return self.out(torch.tanh(self.again(torch.tanh(self.mid(h)))))


class Normed(nn.Module):
    """LayerNorm and a bare parameter for the scale of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 1)).double()
        self.scale = nn.Parameter(torch.tensor([1.5]).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


@pytest.mark.parametrize("make", [Fourier, Sine, Tied, Normed])
@pytest.mark.parametrize("options", [{}, {"gram": "factored"}, {"chunk_size": 4}])
def test_networks(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, x = make(), torch.rand(7, 2).double()
    params = list(net.parameters())
    expected = dense_direction(*rows_of(params, by_autograd(net, x) + 1))
    close(flat(GaussNewton(net, damping=DAMPING, **options).direction(lambda: by_autograd(net, x) + 1)), expected)


def test_two_networks_and_an_unknown_coefficient() -> None:
    """An inverse problem: fields u and v and a coefficient k of the equation; one group touches v alone."""
    u, v, k = network(seed=0), network(seed=1), nn.Parameter(torch.tensor(0.3).double())
    x, data = torch.rand(6, 2).double(), torch.rand(4, 2).double()

    def closure() -> dict[str, Tensor]:
        return {"equation": by_autograd(u, x) - k * v(x).squeeze(1), "data": v(data).squeeze(1) - 1}

    params = [*u.parameters(), *v.parameters(), k]
    groups = closure()
    scaled = torch.cat([r / math.sqrt(len(r)) for r in groups.values()])
    rows, _ = rows_of(params, scaled)
    s = scaled.detach()
    expected = dense_direction(rows * math.sqrt(len(s)), s)
    close(flat(GaussNewton(params, damping=DAMPING).direction(closure)), expected)
    first = GaussNewton(params, damping="adaptive")
    losses = [first.step(closure).item() for _ in range(6)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("shape", [list, tuple, dict])
def test_groups_as_list_tuple_and_dict(shape: type) -> None:
    net, x = network(), torch.rand(5, 2).double()

    def closure() -> Any:
        parts = [net(x).squeeze(1) - 1, net(x[:2]).squeeze(1) - 1]
        return dict(zip("ab", parts, strict=True)) if shape is dict else shape(parts)

    weights = {"b": 2.0} if shape is dict else {"1": 2.0}
    opt = GaussNewton(net, weights=weights, damping=1e-3)
    first, second = net(x).squeeze(1) - 1, net(x[:2]).squeeze(1) - 1
    expected = (first.square().mean() + 2 * second.square().mean()).item() / 2
    losses = [opt.step(closure).item() for _ in range(3)]
    assert losses[0] == pytest.approx(expected, rel=1e-12)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("options", [{}, {"gram": "factored"}, {"chunk_size": 7}])
def test_dropout_has_one_mask_a_step(options: dict[str, Any]) -> None:
    """In training mode the calls of a step are of one function, and the search never accepts an increase."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x = torch.rand(30, 2).double()

    def closure() -> Tensor:
        return net(x).squeeze(1) - x.sum(1)

    opt = GaussNewton(net, damping=1e-2, **options)
    for _ in range(5):
        opt.step(closure)
        assert opt.info is not None
        assert opt.info.loss_after is not None
        assert opt.info.loss_after <= opt.info.loss
    own = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="differ from call to call"):
        GaussNewton(net, gram="factored").direction(lambda: net(torch.rand(9, 2, generator=own).double()).squeeze(1))
    net.eval()
    losses = [opt.step(closure).item() for _ in range(10)]
    assert losses[-1] < 0.1 * losses[0]


def test_batch_norm_couples_points_and_rows_stay_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.rand(6, 2).double()
    expected = dense_direction(*rows_of(list(net.parameters()), net(x).squeeze(1) - 1))
    close(flat(GaussNewton(net, damping=DAMPING).direction(lambda: net(x).squeeze(1) - 1)), expected)


def test_complex_residuals_and_parameters_are_refused() -> None:
    net, x = network(), torch.rand(4, 2).double()
    with pytest.raises(TypeError, match=r"complex128.*real"):
        GaussNewton(net).step(lambda: torch.exp(1j * net(x).squeeze(1)))
    with pytest.raises(ValueError, match="real floating-point"):
        GaussNewton([nn.Parameter(torch.ones(2, dtype=torch.complex128))])


@pytest.mark.parametrize("solve", ["samples", "parameters"])
def test_one_residual(solve: str) -> None:
    net, x = network(), torch.rand(1, 2).double()
    opt = GaussNewton(net, damping=1e-9, chunk_size=3, solve=solve)
    for _ in range(4):
        loss = opt.step(lambda: net(x).squeeze(1) - 1)
    assert loss < 1e-12


def test_nan_in_a_later_step_leaves_the_state() -> None:
    net, x, bad = network(), torch.rand(5, 2).double(), [False]

    def closure() -> Tensor:
        return net(x).squeeze(1) / (0.0 if bad[0] else 1.0)

    opt = GaussNewton(net, momentum=0.5)
    opt.step(closure)
    before, state = flat(net.parameters()), copy.deepcopy(opt.state_dict())
    bad[0] = True
    with pytest.raises(ValueError, match="not finite"):
        opt.step(closure)
    assert torch.equal(flat(net.parameters()), before)
    assert str(opt.state_dict()) == str(state)
    bad[0] = False
    assert opt.step(closure).isfinite()


def test_points_drawn_anew_and_of_another_number() -> None:
    net = network(1, 12)
    torch.manual_seed(1)
    opt = GaussNewton(net, damping="adaptive", momentum=0.5)
    for step in range(40):
        x = torch.rand(40 + step % 3, 1).double() * 2 - 1
        loss = opt.step(lambda x=x: net(x).squeeze(1) - torch.sin(3 * x).squeeze(1))
    assert loss < 1e-5


def test_a_copied_model_trains_alone() -> None:
    net, x = network(), torch.rand(5, 2).double()
    opt = GaussNewton(net)
    opt.step(lambda: net(x).squeeze(1) - 1)
    twin, before = copy.deepcopy(net), flat(net.parameters())
    other = GaussNewton(twin)
    other.step(lambda: twin(x).squeeze(1) - 2)
    assert torch.equal(flat(net.parameters()), before)
    assert not torch.equal(flat(twin.parameters()), before)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("damping", ["adaptive", 1e-6])
def test_resumes_from_a_file_bit_for_bit(tmp_path: Any, momentum: float, damping: Any) -> None:
    def fresh() -> tuple[nn.Module, GaussNewton, Callable[[], Tensor]]:
        net, x = network(), torch.linspace(0, 1, 12).double().view(6, 2)
        return net, GaussNewton(net, damping=damping, momentum=momentum), lambda: by_autograd(net, x) + 1

    net, opt, closure = fresh()
    for _ in range(3):
        opt.step(closure)
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved")
    for _ in range(3):
        opt.step(closure)
    again, other, own = fresh()
    saved = torch.load(tmp_path / "saved", weights_only=True)
    again.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    for _ in range(3):
        other.step(own)
    assert torch.equal(flat(again.parameters()), flat(net.parameters()))


def test_a_compiled_model() -> None:
    net, x = network(), torch.rand(6, 2).double()
    compiled = torch.compile(net, backend="aot_eager")
    expected = dense_direction(*rows_of(list(net.parameters()), net(x).squeeze(1) - 1))
    close(flat(GaussNewton(net, damping=DAMPING).direction(lambda: compiled(x).squeeze(1) - 1)), expected)
