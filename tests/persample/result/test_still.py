"""Models without chance: two runs are the same, and chunks are checked against the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.result.holding.deterministic import Drawn, Still

X = torch.linspace(-1, 1, 24).view(4, 2, 3)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "native dropout": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "channels": lambda x: F.dropout1d(x, 0.4),
    "alpha": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "attention": attention,
    "depth": lambda x: x * (torch.rand(len(x), 1, 1) < 0.7),
    "noise": lambda x: x + torch.randn_like(x) + torch.randn(x.shape) + torch.normal(x, 1.0) + x.clone().normal_(2.0),
    "between": lambda x: x + torch.empty_like(x).uniform_(1.0, 2.0),
    "mask": lambda x: x * torch.bernoulli(torch.full_like(x, 0.3)) + torch.bernoulli(x, 0.2),
    "mask in place": lambda x: x * torch.empty_like(x).bernoulli_() + torch.empty_like(x).bernoulli_(x.sigmoid()),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "integers": lambda x: x + torch.randint(2, 9, x.shape) + torch.randint(9, x.shape) + x.clone().random_(3, 7),
}


@pytest.mark.parametrize("name", DRAWS)
def test_nothing_is_left_to_chance(name: str) -> None:
    draw = DRAWS[name]
    first, second = draw(X), draw(X)
    assert not torch.equal(first, second)
    with Still():
        together, alone = draw(X), torch.cat([draw(sample) for sample in X.split(1)])
    torch.testing.assert_close(together, alone)


def test_values_are_those_in_the_middle() -> None:
    with Still():
        assert torch.equal(F.dropout(X, 0.4), X)
        assert torch.rand(2).tolist() == [0.5, 0.5]
        assert torch.empty(1).uniform_(2, 4).item() == 3
        assert torch.empty(1).normal_(7).item() == 7
        assert torch.randint(3, 9, (1,)).item() == 3
        assert torch.empty(1).bernoulli_().item() == 0.5


def test_what_cannot_be_replaced_is_said() -> None:
    assert torch.equal(attention_without_dropout(), attention_without_dropout())
    with Still():
        attention_without_dropout()  # might draw, and does not
        with pytest.raises(Drawn, match="randperm"):
            torch.randperm(5)


def attention_without_dropout() -> Tensor:
    return F.scaled_dot_product_attention(X[None], X[None], X[None])


class Positions(nn.Module):
    """Adds embeddings of positions, which all samples share, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.drop = nn.Embedding(9, 3), nn.Embedding(9, 3), nn.Dropout(0.1)

    def forward(self, words: Tensor, places: Tensor) -> Tensor:
        return self.drop(self.words(words) + self.places(places))


def test_a_shared_input_that_would_be_cut_is_refused_with_dropout_too() -> None:
    """As many positions as samples: of one sample and one position the model makes something, too."""
    model, words = Positions().double(), torch.randint(9, (4, 4))
    with pytest.raises(persample.CheckError, match="have other losses in a chunk of their own"):
        persample.per_sample(model, lambda y, _: y.flatten(1).sum(1), (words, torch.arange(4)), chunk_size=1)
    found = persample.per_sample(model, lambda y, _: y.flatten(1).sum(1), (words, torch.arange(4)[None]), chunk_size=1)
    again = found.grads()
    for name, rows in found.grads().items():
        assert torch.equal(rows, again[name])


def test_random_numbers_are_left_as_they_were_by_the_check() -> None:
    model, words = Positions().double(), torch.randint(9, (4, 4))
    states = []
    for check in (True, False):
        torch.manual_seed(0)
        inputs = words, torch.arange(4)[None]
        persample.per_sample(model, lambda y, _: y.flatten(1).sum(1), inputs, chunk_size=2, check=check).norms()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
