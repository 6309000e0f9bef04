"""reweight: layers that work on what all samples share."""

from __future__ import annotations

import pytest
import torch
from oracle import loop_grads
from torch import Tensor, nn

from persample.reweighting import reweight

pytestmark = pytest.mark.usefixtures("double")


class Queries(nn.Module):
    """Attention of as many learnt queries as there are samples, with a table of positions, also as long."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(samples, 3))
        self.asks, self.key, self.places, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(3.0 * x.shape[1]).view(-1, 3).to(x))
        keys = self.key(x) + places
        return self.head(torch.einsum("qd,btd->bqt", self.asks(self.queries), keys).softmax(2) @ keys)


def test_what_all_samples_share_has_no_rows() -> None:
    """A layer whose output has as many rows as there are samples, but works on none of them, stays plain."""
    model, x = Queries(4).double(), torch.randn(4, 4, 3).double()
    expected = loop_grads(model, lambda out, _: out.square().flatten(1).sum(1), x, None)
    c = torch.randn(4)
    with reweight(model, lambda layer, grads: c, batch_axis={"key": 0, "head": 0}) as handle:
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            plain = {path for path, why in handle.explain().items() if why.startswith("plain: it works on what all")}
            assert plain == {"asks", "places"}
            for name, parameter in model.named_parameters():
                weights = torch.ones(4) if name.partition(".")[0] in {*plain, "queries"} else c
                want = torch.einsum("b,b...->...", weights.double(), expected[name])
                torch.testing.assert_close(parameter.grad, want)


def test_shared_after_a_call_on_samples() -> None:
    """The same layer first on the batch, then on what all samples share: one plain gradient."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.anchor = nn.Linear(3, 2), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.layer(self.anchor).sum(0)

    model, x = Both().double(), torch.randn(4, 3).double()
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with reweight(model, lambda layer, grads: torch.zeros(4)):
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name])
