"""reweight: models that take time first, [T, B, …], are read by samples and not by steps, and others are let alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from oracle import loop_grads_of
from passes import B, Mode, Tokens, every_mode, modules_of, of_samples, same, step
from torch import Tensor, nn

from persample.reweighting import LayerGrads, reweight

pytestmark = pytest.mark.usefixtures("double")

Losses = Callable[[Tensor], Tensor]


class Cell(nn.Module):
    """A recurrence in Python, whose layers see one step at a time, [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.over = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[0]), []
        for each in x:
            state = torch.tanh(self.into(each) + self.over(state))
            states.append(state)
        return torch.stack(states)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


MIXING: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(6, 6),
    "gru of two layers, both ways": lambda: nn.GRU(6, 3, 2, bidirectional=True),
    "recurrence in Python": Cell,
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0),
    "attention with weights": Attention,
}


@every_mode
@pytest.mark.parametrize("steps", [7, B])
@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_steps_are_read_by_samples(name: str, steps: int, mode: Mode) -> None:
    """Whatever the losses say: here they are not one for each sample on the way to their sum."""
    model, x = Tokens(MIXING[name]()), torch.randint(20, (steps, B))
    groups = {path: names for path, names in modules_of(model).items() if "out_proj" not in path}
    expected = mode.expected(model, of_samples(model(x)), groups)
    with warnings.catch_warnings(), mode.on(model):
        warnings.simplefilter("error")
        for _ in range(2):
            same(step(model, lambda: model(x).sin().sum() / (5 * steps)), expected)
        shorter = torch.randint(20, (3, B))
        step(model, lambda: model(shorter).sin().sum())  # another shape, the same samples


class Classes(Tokens):
    """The last step alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[-1]


class Translation(nn.Module):
    """Two sequences, of which the second is answered."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 6), nn.Linear(6, 5)
        self.both = nn.Transformer(6, 2, 1, 1, 8, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.both(self.table(x), self.table(x[:5] + 1)))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@every_mode
@pytest.mark.parametrize("name", ["classes", "translation"])
def test_outputs_that_hold_no_steps_of_the_input(name: str, mode: Mode) -> None:
    model = Classes(nn.LSTM(6, 6)) if name == "classes" else Translation()
    x = torch.randint(19, (7, B))
    losses = (lambda: model(x).sin().mean(1)) if name == "classes" else (lambda: of_samples(model(x)))
    groups = {path: names for path, names in modules_of(model).items() if "out_proj" not in path}
    expected = mode.expected(model, losses(), groups)
    with mode.on(model):
        for _ in range(2):
            same(step(model, losses), expected)


class Chosen(nn.Module):
    """The last steps of sequences that have lengths, and rows that a mask picks: here as many as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(20, 6), nn.GRU(6, 6)
        self.inp, self.masked, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        h = self.rnn(self.inp(self.table(x)))[0]
        return self.out(h[lengths - 1, torch.arange(B)]) + self.masked(h[x == 0]).sum(), h


def test_rows_that_are_selected_are_tried_with_other_samples() -> None:
    """Along axis 1: one layer has a row of each sample, the other as many rows, two of them of one."""
    model, x = Chosen(), torch.randint(1, 20, (7, B))
    x[[0, 2, 3, 5], [0, 1, 1, 2]] = 0
    lengths, sizes = torch.tensor([7, 4, 5, 2]), {}

    def policy(layer: str, grads: LayerGrads) -> None:
        sizes[layer] = None if layer == "masked" else grads.batch_size

    with reweight(model, policy) as handle:
        step(model, lambda: model(x, lengths)[0].sin().mean(1))
        assert sizes["out"] == B
        assert handle.explain()["out"].endswith("axis 0 of its output")
    with (
        reweight(model, lambda layer, grads: torch.ones(grads.batch_size)),
        pytest.raises(ValueError, match="cannot tell which axis of layer 'masked'"),
    ):
        step(model, lambda: model(x, lengths)[0].sin().mean(1))


def test_an_output_of_features_holds_no_samples() -> None:
    """[F], of an input [B, F]: as many as it has features, and every one depends on every sample."""
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, Mean())
    with reweight(model, lambda layer, grads: torch.ones(grads.batch_size)) as handle:
        model(torch.randn(B, 5)).sin().sum().backward()
        assert handle.explain()["0"] == "reweighted, samples on axis 0 of its output"


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrence_that_is_one_operation(batch_first: bool) -> None:
    """In single precision, on a CPU."""
    model, x, sizes = Tokens(nn.LSTM(6, 6, batch_first=batch_first)).float(), torch.randint(20, (7, B)), {}
    with reweight(model, lambda layer, grads: sizes.update({layer: grads.batch_size})):
        step(model, lambda: model(x).sin().sum())
    assert sizes == dict.fromkeys(["layer", "out"], 7 if batch_first else B)


@pytest.mark.parametrize("name", ["encoder", "attention with weights"])
def test_functions_of_models_that_mix_steps(name: str) -> None:
    model, x = Tokens(MIXING[name]()), torch.randint(20, (7, B))
    rows = loop_grads_of(of_samples(model(x)), dict(model.named_parameters()))
    c, sizes = torch.rand(B), {}

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        sizes[layer] = grads.batch_size
        return c

    with reweight(model, policy, functions=True) as handle:
        got = step(model, lambda: of_samples(model(x)))
        own = {id(each) for path in handle.layers for each in handle.parameters(path)}
    assert set(sizes.values()) == {B}
    assert any("in_proj" in path for path in sizes)
    for path, parameter in model.named_parameters():
        weights = c if id(parameter) in own else torch.ones(B)
        torch.testing.assert_close(got[path], torch.tensordot(weights, rows[path], 1))


class Flattened(Tokens):
    """As many rows as tokens in between."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten()).unflatten(0, x.shape)


class Centred(nn.Module):
    """A normalisation over the batch that has no name."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.var(0).add(1).sqrt()


BATCH_FIRST: dict[str, tuple[Callable[[], nn.Module], Losses]] = {
    "mean of everything": (Tokens, lambda output: output.sin().mean()),
    "one loss a sample": (Tokens, lambda output: output.sin().mean((1, 2))),
    "one loss a token": (Tokens, lambda output: output.sin().mean(2)),
    "tokens as rows": (Flattened, lambda output: output.sin().flatten(0, 1).mean(1)),
    "losses of single entries": (Tokens, lambda output: output.sin()),
    "sums over the batch, of a model that mixes tokens": (
        lambda: Tokens(nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)),
        lambda output: output.sin().mean((0, 2)),
    ),
    "recurrence": (lambda: Tokens(nn.LSTM(6, 6, batch_first=True)), lambda output: output.sin().mean((0, 2))),
    "statistics of the batch": (lambda: Tokens(Centred()), lambda output: output.sin().mean((1, 2))),
}


@pytest.mark.parametrize("tokens", [7, B])
@pytest.mark.parametrize("name", BATCH_FIRST)
def test_batch_first_is_read_as_ever(name: str, tokens: int) -> None:
    build, losses = BATCH_FIRST[name]
    model, x = (
        build(),
        torch.randint(20, (B, tokens + (name == "statistics of the batch"))),
    )  # coupled, B = T is refused
    with reweight(model, lambda layer, grads: torch.rand(B)) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step(model, lambda: losses(model(x)))
        told = handle.explain()["layer"]
    assert told.startswith("reweighted, samples ")
    assert told.endswith("on axis 0 of its output")
