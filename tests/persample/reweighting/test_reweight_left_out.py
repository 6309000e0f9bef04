"""reweight: a layer whose rows nobody can tell is left alone by whoever wants nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import loop_grads_of
from torch import Tensor, nn

import fngd
from persample import LayerGrads, reweight

pytestmark = pytest.mark.usefixtures("double")


class Experts(nn.Module):
    """Each row goes to the experts that are named for it."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.enter, self.expert = nn.Linear(4, 4), expert

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        h = self.enter(x).tanh()
        rows = h.flatten(0, 1)[chosen]
        found = self.expert(rows).renorm(2, 0, 1e9)  # of which no proof knows how it treats samples
        return h.flatten(0, 1).index_add(0, chosen, found).view_as(h).sin().sum((1, 2))


class OneByOne(nn.Module):
    """A layer that is called for each sample, without an axis for samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.enter, self.expert = nn.Linear(4, 4), layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.expert(each).sin().sum() for each in self.enter(x).tanh()])


CASES: dict[str, Any] = {
    "selected": lambda: (Experts(nn.Linear(4, 4)), torch.randn(5, 3, 4), torch.tensor([0, 1, 4, 9, 10, 11, 13])),
    "one by one": lambda: (OneByOne(nn.Linear(4, 2)), torch.randn(5, 4)),
    "images one by one": lambda: (OneByOne(nn.Sequential(nn.Unflatten(0, (2, 2)), nn.Conv1d(2, 3, 2))),
                                  torch.randn(5, 4)),
}  # fmt: skip


def of_enter(rows: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """Factors for `enter`, the plain gradient for the rest."""
    ones = torch.ones(len(factors))
    return {name: torch.tensordot(factors if name.startswith("enter") else ones, row, 1) for name, row in rows.items()}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_the_policy_wants_nothing_of(name: str, joint: bool) -> None:
    model, *inputs = CASES[name]()
    expected = of_enter(loop_grads_of(model(*inputs), dict(model.named_parameters())), torch.arange(1.0, 6))

    def policy(layer: str, grads: LayerGrads) -> Tensor | None:
        return torch.arange(1.0, 6) if layer == "enter" else None

    def of_all(grads: dict[str, LayerGrads]) -> dict[str, Any]:
        return {layer: policy(layer, each) for layer, each in grads.items()}

    with reweight(model, of_all if joint else policy, joint=joint):
        model(*inputs).sum().backward()
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[path])


@pytest.mark.parametrize(
    "use",
    [
        lambda grads: torch.ones(7),
        lambda grads: grads.batch_size,
        lambda grads: grads.gram(),
        lambda grads: grads.norms(),
        lambda grads: grads.calls,
        lambda grads: grads.factors(),
        lambda grads: grads.explain(),
        lambda grads: grads.weighted_sum(torch.ones(7)),
    ],
)
def test_whoever_wants_something_is_told_and_what_to_do(use: Any) -> None:
    model, *inputs = CASES["selected"]()
    message = r"'expert' counts samples.* Or leave the layer out: a policy that returns None.*precondition=False"
    with (
        reweight(model, lambda layer, grads: None if layer == "enter" else use(grads)),
        pytest.raises(ValueError, match=message),
    ):
        model(*inputs).sum().backward()


@pytest.mark.parametrize("gram", ["layer", "network"])
def test_a_group_that_is_not_preconditioned(gram: str) -> None:
    model, x, chosen = CASES["selected"]()
    rows = loop_grads_of(model(x, chosen), dict(model.named_parameters()))
    groups = [{"params": model.enter.parameters()}, {"params": model.expert.parameters(), "precondition": False}]
    optimiser = fngd.FNGD(model, groups, lr=0.0, steps_per_epoch=1, gram=gram)
    own = torch.cat([rows["enter.weight"].flatten(1), rows["enter.bias"]], 1)
    gram_matrix = own @ own.T
    damping = 1e-2 * gram_matrix.norm()
    factors = 5 * damping * torch.linalg.solve(gram_matrix + 5 * damping * torch.eye(5), torch.ones(5))
    expected = of_enter(rows, factors)
    for _ in range(2):  # computed, and stored
        model(x, chosen).mean().backward()
        for path, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[path] / 5)
        optimiser.step()
        optimiser.zero_grad()


def test_an_expert_that_the_first_batch_does_not_reach() -> None:
    """As many of its rows as samples in a later one, of two of them."""

    class Routed(Experts):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            return super().forward(x, chosen) if len(chosen) else self.enter(x).sum((1, 2))

    model, x = Routed(nn.Linear(4, 4)), torch.randn(4, 3, 4)
    with reweight(model, lambda layer, grads: torch.ones(grads.batch_size)):
        model(x, torch.tensor([], dtype=torch.long)).sum().backward()
        with pytest.raises(ValueError, match=r"'expert' counts samples.*rows that change with others than their own"):
            model(x, torch.tensor([0, 1, 2, 9])).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_follows_an_expert_is_read_whoever_is_in_its_company(dtype: torch.dtype) -> None:
    """How many rows an expert has changes with other samples, and with it the last digits of every row."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.expert, self.last = nn.Linear(33, 47), nn.Linear(47, 47), nn.Linear(47, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.enter(x).tanh()
            chosen = (h[:, 0] > 0).nonzero().flatten()
            return self.last(torch.zeros_like(h).index_add(0, chosen, self.expert(h[chosen])) + h)

    for seed in range(5):
        torch.manual_seed(seed)
        model, sizes = Gated().to(dtype), []

        def policy(layer: str, grads: LayerGrads, sizes: list[int] = sizes) -> None:
            if layer == "last":
                sizes.append(grads.batch_size)

        with reweight(model, policy):
            model(torch.randn(7, 33, dtype=dtype)).sum().backward()
        assert sizes == [7]
