"""reweight: rows that are the same in all samples (padding, say) do not tell a trial whose they are."""

from __future__ import annotations

import pytest
import torch
from folding import Tokens, assert_exact, factors_of, rows_by_layer
from torch import Tensor, nn

from persample import reweight

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("real", [1, 3])
def test_padding_to_a_fixed_length(real: int, time_first: bool) -> None:
    """Two thirds and more of the places are padding in every sample."""
    tokens = torch.randint(1, 7, (4, 12))
    tokens[:, 0], tokens[:, real:] = torch.arange(1, 5), 0
    assert_exact(Tokens(time_first), tokens, plain=("table",))


def test_two_samples_that_are_alike_in_half_of_their_places() -> None:
    assert_exact(Tokens(False), torch.tensor([[1, 2], [1, 3]]), plain=("table",))


class Prototypes(nn.Module):
    """What all samples share lies below their rows, and there is as much of it: no sample's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        own, shared = self.layer(torch.cat([x, self.table])).chunk(2)
        return own @ shared.T


def test_shared_rows_that_differ_are_refused() -> None:
    model = Prototypes()
    with (
        reweight(model, lambda layer, grads: torch.ones(grads.batch_size)),
        pytest.raises(ValueError, match=r"shape \[8, 2\], the model's input has 4 samples"),
    ):
        model(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize("time_first", [False, True])
def test_samples_that_are_equal_in_a_later_batch(time_first: bool) -> None:
    """Nothing changes where one takes the other's place: rows lie as they have lain."""
    model, seen = Tokens(time_first), {}
    with reweight(model, lambda layer, grads: factors_of(grads.gram())):
        model(torch.randint(7, (4, 6))).sum().backward()
        model.zero_grad()
        tokens = torch.randint(7, (1, 4)).expand(2, 4).clone()
        model(tokens).sin().sum().backward()
        seen = {name: each.grad for name, each in model.named_parameters()}
    for layer, rows in rows_by_layer(model, tokens).items():
        if layer != "table":
            whole = torch.cat([each.flatten(1) for each in rows.values()], 1)
            for name, each in rows.items():
                torch.testing.assert_close(seen[name], torch.tensordot(factors_of(whole @ whole.T), each, 1))


class Windows(nn.Module):
    """Raises where it is told to, after its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.interrupted = nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.flatten(0, 1))
        if self.interrupted:
            raise KeyboardInterrupt
        return h.unflatten(0, x.shape[:2]).sum(1)


def test_a_pass_that_was_interrupted_is_tried_out_when_it_is_repeated() -> None:
    model, sizes = Windows(), []
    with reweight(model, lambda layer, grads: sizes.append(grads.batch_size)):
        model(torch.randn(4, 1, 3)).sum().backward()  # one window: rows are samples
        model.interrupted = True
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(4, 2, 3))
        model.interrupted = False
        model(torch.randn(4, 2, 3)).sum().backward()
    assert sizes == [4, 4]
