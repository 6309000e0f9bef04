"""Shares of positions, against weights that each position has for itself; Gram matrices without the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from oracle import loop_grads, rel_err
from strategies import Example, layers
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.testing.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("double")


def squares(outputs: Tensor, _: object) -> Tensor:
    return outputs.tanh().flatten(1).square().sum(1)


def own_weights(call: Callable[[Tensor], Tensor], weight: Tensor, *places: int) -> Tensor:
    """Gradients of the sum of all losses for weights of which each position has one, [*places, *shape]."""
    each = weight.detach().expand(*places, *weight.shape).clone().requires_grad_()
    [grads] = torch.autograd.grad(squares(call(each), None).sum(), each)
    return grads


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = nn.Linear(4, 3), torch.randn(5, 6, 4)
    return model, x, own_weights(lambda w: torch.einsum("bti,btoi->bto", x, w) + model.bias, model.weight, 5, 6)


def table() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = nn.Embedding(7, 3), torch.randint(7, (5, 6))
    picked = F.one_hot(x, 7).double()
    return model, x, own_weights(lambda w: torch.einsum("btv,btvd->btd", picked, w), model.weight, 5, 6)


def convolution() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2), torch.randn(5, 4, 6, 5)
    size = model(x).shape[2:]
    patches = F.unfold(x, (3, 2), (1, 2), 1, (2, 1)).view(5, 2, 2 * 6, -1)  # [B, groups, I / groups · kernel, T]

    def call(w: Tensor) -> Tensor:
        out = torch.einsum("bgit,btgoi->bgot", patches, w.view(5, -1, 2, 3, 12))
        return out.flatten(1, 2).view(5, 6, *size) + model.bias[:, None, None]

    return model, x, own_weights(call, model.weight, 5, size.numel())


def transposed() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), torch.randn(5, 2, 4)

    def call(w: Tensor) -> Tensor:
        parts = [F.conv_transpose1d(x[b : b + 1, :, t : t + 1], w[b, t], stride=2) for b in range(5) for t in range(4)]
        out = x.new_zeros(5, 3, 9)
        for k, part in enumerate(parts):
            b, t = divmod(k, 4)
            out = out + F.pad(part, (2 * t, 6 - 2 * t, 0, 0, b, 4 - b))
        return out[:, :, 1:-1] + model.bias[:, None]

    return model, x, own_weights(call, model.weight, 5, 4)


@pytest.mark.parametrize("options", [{}, {"hold": "graph"}, {"chunk_size": 2}], ids=["factors", "graph", "chunks"])
@pytest.mark.parametrize("make", [linear, table, convolution, transposed], ids=lambda make: make.__name__)
def test_shares_are_gradients_of_weights_of_ones_own(make: Callable, options: dict[str, Any]) -> None:
    model, x, shares = make()
    psg = persample.per_sample(model, squares, x, **options)
    batch, count = shares.shape[:2]
    lines = shares.reshape(batch * count, -1)
    gram = psg.gram("position")["weight"]
    assert gram.shape == (batch, count, batch, count)
    assert rel_err(gram.reshape(batch * count, -1), lines @ lines.T) < 1e-9
    norms = psg.norms("position")
    assert set(norms) == {"weight"}  # of a bias the positions have been added up
    assert rel_err(norms["weight"], lines.norm(dim=1).view(batch, count)) < 1e-9


def test_shares_of_two_batches() -> None:
    model, x, shares = linear()
    y = torch.randn(3, 2, 4)
    other = own_weights(lambda w: torch.einsum("bti,btoi->bto", y, w) + model.bias, model.weight, 3, 2)
    ours, theirs = (persample.per_sample(model, squares, each) for each in (x, y))
    want = torch.einsum("btoi,csoi->btcs", shares, other)
    assert rel_err(ours.gram("position", theirs)["weight"], want) < 1e-9


def parts_agree(psg: Any, rows: dict[str, Tensor], tolerance: float) -> None:
    """Shares add up to the gradient: added up over positions, their products are those of rows."""
    gram, norms = psg.gram("position"), psg.norms("position")
    assert gram.keys() == norms.keys()
    for name, matrix in gram.items():
        batch, count = matrix.shape[:2]
        row = rows[name].reshape(batch, rows[name][:1].numel()) if batch else rows[name].flatten(1)
        real = torch.view_as_real(row).flatten(1) if row.is_complex() else row
        assert rel_err(matrix.sum((1, 3)), real @ real.T) < tolerance
        own = matrix.reshape(batch * count, batch * count).diagonal().clamp(min=0).sqrt().view(batch, count)
        assert rel_err(norms[name], own) < max(1e-6, 10 * tolerance**0.5)


@pytest.mark.parametrize("case", [case for case in CASES if not case.coupled], ids=lambda case: case.name)
def test_shares_add_up_in_every_case(case: Case) -> None:
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(1)
    rows = loop_grads(model, loss_fn, inputs, targets)
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(1)
    psg = persample.per_sample(model, loss_fn, inputs, targets)
    parts_agree(psg, rows, 1e-4 if "float32" in case.tags else 1e-9)


@given(layers())
def test_shares_of_drawn_layers_add_up(example: Example) -> None:
    built = example.build()
    parts_agree(persample.per_sample(*built), loop_grads(*built), 1e-9)


def test_factors_that_rows_have_replaced_have_no_positions() -> None:
    model, x = nn.Linear(2, 2, bias=False), torch.randn(3, 50, 2)
    psg = persample.per_sample(model, squares, x)
    psg.norms()
    with pytest.raises(
        RuntimeError, match=r"factors of \['weight'\] were replaced by rows.*Ask for per='position' before"
    ):
        psg.norms("position")


def test_chunks_with_other_numbers_of_positions() -> None:
    class Valid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            kept = (x[:, :, 0] > 0).flatten()
            rows = self.inner(x.flatten(0, 1)[kept])
            out = x.new_zeros(x.shape[0] * x.shape[1], 2).index_put((kept.nonzero()[:, 0],), rows)
            return out.view(*x.shape[:2], 2)

    x = torch.randn(4, 5, 3).abs()
    x[2:, 2:, 0] *= -1
    whole = persample.per_sample(Valid(), squares, x).norms("position")["inner.weight"]
    assert whole.shape == (4, 5)
    assert not whole[2:, 2:].any()
    with pytest.raises(ValueError, match="chunks have different numbers of positions"):
        persample.per_sample(Valid(), squares, x, chunk_size=2).norms("position")


# --- without the mean ---------------------------------------------------------------------------------------


def spread(rows: dict[str, Tensor]) -> Tensor:
    """Gradients without their mean, as rows of real numbers."""
    real = [torch.view_as_real(r - r.mean(0)) if r.is_complex() else r - r.mean(0) for r in rows.values()]
    return torch.cat([r.reshape(len(r), r[:1].numel()) for r in real], 1)


@pytest.mark.parametrize("options", [{}, {"hold": "graph"}, {"chunk_size": 2}], ids=["factors", "graph", "chunks"])
def test_centred_matrices(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 2, 6)
    rows = loop_grads(model, squares, x, None)
    psg = persample.per_sample(model, squares, x, **options)
    lines = spread(rows)
    assert rel_err(psg.gram(centred=True), lines @ lines.T) < 1e-9
    for name, matrix in psg.gram("param", centred=True).items():
        line = spread({name: rows[name]})
        assert rel_err(matrix, line @ line.T) < 1e-9


@pytest.mark.parametrize("options", [{}, {"hold": "graph"}, {"chunk_size": 3}], ids=["factors", "graph", "chunks"])
def test_what_samples_differ_by_is_not_lost(options: dict[str, Any]) -> None:
    """Alike to four digits, in float32: of the differences as many digits are right as the rows have of them."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(1, 3, 8) + 1e-4 * torch.randn(7, 3, 8)
    lines = spread(loop_grads(model, squares, x, None))
    found = persample.per_sample(model.float(), squares, x.float(), **options).gram(centred=True)
    assert found.dtype == torch.float32
    exact = lines @ lines.T
    assert float((found - exact).abs().max() / exact.abs().max()) < 2e-2
    plain = persample.per_sample(model, squares, x.float()).gram()
    mean = plain.mean(0)
    lost = plain - mean - mean[:, None] + plain.mean()
    assert float((lost - exact).abs().max() / exact.abs().max()) > 0.1


@pytest.mark.parametrize("alike", [False, True])
def test_centred_kernels_of_outputs(alike: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    x = x[:1] + 1e-3 * x if alike else x
    jac = persample.jacobian(model, x)
    rows = {name: r - r.mean(0) for name, r in jac.rows().items()}
    lines = torch.cat([r.flatten(2) for r in rows.values()], 2).flatten(0, 1)
    assert rel_err(jac.gram(centred=True).reshape(18, 18), lines @ lines.T) < 1e-9
    bias = rows["0.bias"].flatten(0, 1)
    assert rel_err(jac.gram("param", centred=True)["0.bias"].reshape(18, 18), bias @ bias.T) < 1e-9


def test_complex_amplitudes_as_two_outputs() -> None:
    """The minimum-step stochastic reconfiguration of log ψ: real and imaginary parts are two outputs."""

    class Amplitude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3, dtype=torch.complex128)

        def forward(self, spins: Tensor) -> Tensor:
            return torch.log(torch.cosh(self.inner(spins + 0j))).sum(1)

    model, spins = Amplitude(), torch.randn(6, 4)
    jac = persample.jacobian(model, spins, output_fn=torch.view_as_real)
    rows = {n: torch.stack(_both(model, spins, p), 1) for n, p in model.named_parameters()}
    lines = torch.cat([torch.view_as_real(r - r.mean(0)).flatten(2) for r in rows.values()], 2).flatten(0, 1)
    assert rel_err(jac.gram(centred=True).reshape(12, 12), lines @ lines.T) < 1e-9


def _both(model: nn.Module, spins: Tensor, parameter: Tensor) -> list[Tensor]:
    parts = torch.view_as_real(model(spins))
    rows = [[torch.autograd.grad(f, parameter, retain_graph=True)[0] for f in parts[:, k]] for k in range(2)]
    return [torch.stack(each) for each in rows]


def test_what_centred_does_not_go_with() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    psg, jac = persample.per_sample(model, squares, x), persample.jacobian(model, x)
    chunked = persample.per_sample(model, squares, x, chunk_size=2)
    for found in (psg, chunked):
        with pytest.raises(ValueError, match="other= holds another batch"):
            found.gram(other=psg, centred=True)
        with pytest.raises(ValueError, match="exclude each other"):
            found.gram("position", centred=True)
    with pytest.raises(ValueError, match="other= holds another batch"):
        jac.gram(other=jac, centred=True)
