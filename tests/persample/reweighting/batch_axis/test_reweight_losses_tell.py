"""reweight: what the losses of a batch tell of models that take time first, and what weights of positions do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from passes import B, Mode, Tokens, every_mode, modules_of, of_samples, same, step
from torch import Tensor, nn

import fngd
from persample.reweighting import LayerGrads, reweight

pytestmark = pytest.mark.usefixtures("double")


class TimeMean(nn.Module):
    """What every step has in common is taken away: that, too, may be a normalisation over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("between", [None, TimeMean])
@pytest.mark.parametrize("steps", [7, B])
def test_losses_over_axis_0_leave_samples_there_and_tell(steps: int, between: Callable | None) -> None:
    """Whether they are one for each sample, or sums over the batch, nothing says; most batches are in front."""
    if steps == B and between is not None:
        pytest.skip("coupled, B = T is refused")
    model, x = Tokens(None if between is None else between()), torch.randint(20, (steps, B))
    sizes: dict[str, int] = {}

    def policy(layer: str, grads: LayerGrads) -> None:
        sizes[layer] = grads.batch_size

    with reweight(model, policy) as handle:
        with pytest.warns(UserWarning, match=rf"\[{B}\], one for each entry of axis 1 of.*batch_axis=1, or") as told:
            step(model, lambda: of_samples(model(x)))
        assert len(told) == 1
        assert handle.explain()["layer"].endswith("on axis 0 of its output")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for other in (x, torch.randint(20, (3, B))):
                step(model, lambda each=other: of_samples(model(each)))
                assert sizes == {"layer": len(other), "out": len(other)}


@every_mode
@pytest.mark.parametrize("steps", [7, B])
def test_the_axis_that_the_warning_names(steps: int, mode: Mode) -> None:
    model, x = Tokens(), torch.randint(20, (steps, B))
    expected = mode.expected(model, of_samples(model(x)))
    with mode.on(model, batch_axis=1), warnings.catch_warnings():
        warnings.simplefilter("error")
        same(step(model, lambda: of_samples(model(x))), expected)


@pytest.mark.filterwarnings("ignore:NGD preconditions")
def test_optimisers_are_asked_about_samples() -> None:
    model, x = Tokens(), torch.randint(20, (7, B))
    optimizer = fngd.NGD(model, lr=0.1)
    with pytest.warns(UserWarning, match="batch_axis=1"):
        of_samples(model(x)).mean().backward()
    with pytest.warns(UserWarning, match="NGD preconditions 35 %"):  # most of the model is its table
        optimizer.step()
    optimizer.remove()


class Positions(nn.Module):
    """A matrix of its own for each position, and a table of positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(positions, 6, 6))
        self.table = nn.Embedding(positions, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("btd,tdo->bto", x, self.weights / 2)
        return y + self.table(torch.arange(x.shape[1]))


class Transposed(Tokens):
    """Takes time first, and puts samples in front before anything else, or before its last layer."""

    def __init__(self, between: nn.Module | None = None, late: bool = False) -> None:
        super().__init__(between)
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        if not self.late:
            return super().forward(x.T)
        return self.out(self.layer(self.between(self.table(x))).tanh().transpose(0, 1))


TRANSPOSED: dict[str, Callable[[int], nn.Module]] = {
    "nothing": lambda _: Transposed(),
    "late": lambda _: Transposed(late=True),
    "positions": lambda steps: Transposed(Positions(steps)),
    "encoder": lambda _: Transposed(nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)),
    "recurrence": lambda _: Transposed(nn.LSTM(6, 6, batch_first=True)),
}


def in_front(output: Tensor) -> Tensor:
    """[B, …] → [B]."""
    return output.sin().flatten(1).mean(1)


@every_mode
@pytest.mark.parametrize("steps", [7, B])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_losses_of_samples_that_the_model_puts_in_front(name: str, steps: int, mode: Mode) -> None:
    model, x = TRANSPOSED[name](steps), torch.randint(20, (steps, B))
    groups = {path: names for path, names in modules_of(model).items() if "out_proj" not in path}
    expected = mode.expected(model, in_front(model(x)), groups)
    other = torch.randint(20, (B if name != "positions" else steps, B))  # as many steps as samples
    of_other = mode.expected(model, in_front(model(other)), groups)
    with mode.on(model), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            same(step(model, lambda: in_front(model(x))), expected)
        same(step(model, lambda: in_front(model(other))), of_other)
    told = [each for each in told if issubclass(each.category, UserWarning)]
    assert len(told) == (0 if name in ("encoder", "recurrence") else 1)
    assert all("one for each entry of axis 0 of the model's output" in str(each.message) for each in told)


@every_mode
@pytest.mark.parametrize("positions", [7, B])
def test_a_weight_for_each_position_is_no_sign_of_time_first(positions: int, mode: Mode) -> None:
    """It goes with those of every sample, and mixes nothing; nor do losses without samples say anything."""
    model, x = Tokens(Positions(positions)), torch.randint(20, (B, positions))
    expected = mode.expected(model, in_front(model(x)))
    with mode.on(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            same(step(model, lambda: in_front(model(x))), expected)
            same(step(model, lambda: model(x).sin().sum() / (5 * positions)), expected)


def test_weights_of_steps_tell_nothing_of_steps_in_front() -> None:
    class Steps(Positions):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("tbd,tdo->tbo", x, self.weights)

    model, x = Tokens(Steps(7)), torch.randint(20, (7, B))
    with reweight(model, lambda layer, grads: None), pytest.warns(UserWarning, match="batch_axis=1"):
        step(model, lambda: of_samples(model(x)))
