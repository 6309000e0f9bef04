"""Rows that data place, those that a mask picks or of a packed sequence: one batch says nothing of the next.

Sizes alone do not tell: as many rows lie otherwise where the lengths of the sequences are others.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fngd
import persample

EQUAL, OTHERS = torch.tensor([3, 3, 3, 3]), torch.tensor([4, 2, 3, 3])  # as many tokens
FACTORS = torch.tensor([1.0, 2.0, -1.0, 0.5])


class Tokens(nn.Module):
    """Works on the tokens of sequences [batch, time, 3] that are not padding; returns each sample's sum of outputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.out, self.how, self.calls = nn.Linear(3, 4), nn.Linear(4, 2), how, 0

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.calls += 1
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        hidden = self.first(x).tanh()
        if self.how == "packed":
            packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
            rows = self.out(packed.data)
            tokens = pad_packed_sequence(packed._replace(data=rows), batch_first=True)[0]
        elif self.how == "masked":
            tokens = hidden.new_zeros(*mask.shape, 2).masked_scatter(mask[..., None], self.out(hidden[mask]))
        elif self.how == "found":
            places = mask.flatten().nonzero().squeeze(1)
            rows = self.out(hidden.flatten(0, 1)[places])
            tokens = hidden.new_zeros(mask.numel(), 2).index_copy(0, places, rows).view(*mask.shape, 2)
        else:  # put back where they were, and only then given to the layer
            packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
            back = pad_packed_sequence(packed, batch_first=True)[0]
            tokens = self.out(back.flatten(0, 1)).view(*mask.shape, 2)
        return (tokens * mask[..., None]).square().flatten(1).sum(1)


def _batch(lengths: Tensor) -> Tensor:
    return torch.randn(4, int(lengths.max()), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _expected(model: Tokens, lengths: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad((FACTORS * model(_batch(lengths), lengths)).sum(), [model.out.weight])
    return gradient


@pytest.mark.parametrize("how", ["masked", "found"])
def test_rows_whose_places_are_indices_are_read_off_these(how: str) -> None:
    torch.manual_seed(0)
    model = Tokens(how).double()
    expected = [_expected(model, lengths) for lengths in (EQUAL, OTHERS)]
    with persample.reweight(model, lambda layer, grads: FACTORS):
        for lengths, gradient in zip((EQUAL, OTHERS), expected, strict=True):
            model.zero_grad()
            model(_batch(lengths), lengths).sum().backward()
            torch.testing.assert_close(model.out.weight.grad, gradient)


def test_rows_that_lie_by_chance_as_others_do_are_refused() -> None:
    torch.manual_seed(0)
    model = Tokens("packed").double()
    with persample.reweight(model, lambda layer, grads: FACTORS):
        with pytest.raises(ValueError, match=r"a mask or a packed sequence places them.*persample\.Folded"):
            model(_batch(EQUAL), EQUAL).sum().backward()
        with pytest.raises(ValueError, match="cannot tell which axis of layer 'out'"):
            model(_batch(OTHERS), OTHERS).sum().backward()


@pytest.mark.parametrize("how", ["packed", "masked"])
def test_where_every_batch_is_so_the_user_may_say_it(how: str):
    torch.manual_seed(0)
    model = Tokens(how).double()
    expected = _expected(model, EQUAL)
    folded = persample.Folded(before=None, after=1) if how == "packed" else persample.Folded()
    with persample.reweight(model, lambda layer, grads: FACTORS, batch_axis={"out": folded}):
        model(_batch(EQUAL), EQUAL).sum().backward()
    torch.testing.assert_close(model.out.weight.grad, expected)


def test_rows_that_were_put_back_are_read_as_ever():
    torch.manual_seed(0)
    model = Tokens("back").double()
    expected = [_expected(model, lengths) for lengths in (EQUAL, OTHERS, EQUAL)]
    with persample.reweight(model, lambda layer, grads: FACTORS):
        for lengths, gradient in zip((EQUAL, OTHERS, EQUAL), expected, strict=True):
            model.zero_grad()
            model(_batch(lengths), lengths).sum().backward()
            torch.testing.assert_close(model.out.weight.grad, gradient)


@pytest.mark.parametrize("gram", ["layer", "network"])
def test_a_layer_that_is_left_out_is_tried_out_once(gram: str):
    torch.manual_seed(0)
    model = Tokens("packed").double()
    groups = [{"params": model.first.parameters()}, {"params": model.out.parameters(), "precondition": False}]
    optimizer = fngd.NGD(model, groups, lr=0.1, gram=gram)
    runs = []
    for lengths in (OTHERS, EQUAL, OTHERS, EQUAL):
        before = model.calls
        model(_batch(lengths), lengths).sum().backward()
        runs.append(model.calls - before)
        optimizer.step()
        optimizer.zero_grad()
    assert runs[0] > 1
    assert runs[1:] == [1, 1, 1]
