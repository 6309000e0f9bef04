"""reweight: which readings of rows the trial with other samples confirms, which it refuses, and when it runs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from folding import Fold, Frames, Swin, Tokens, assert_exact, losses_of, rows_by_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from persample import Folded, reweight
from persample.reweighting.batch_axis.dry_run import dry_run

pytestmark = pytest.mark.usefixtures("double")

B = 4


def sizes_of(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, int]:
    """How many samples each layer is found to have; raises what `reweight` raises."""
    sizes: dict[str, int] = {}
    with reweight(model, lambda layer, grads: sizes.update({layer: grads.batch_size}), **options):
        model(*inputs).sin().sum().backward()
    return sizes


class Rows(nn.Module):
    """A layer on what `choose` makes of [B, T, 3]; counts its calls."""

    def __init__(self, choose: Callable[..., Tensor], before: nn.Module | None = None) -> None:
        super().__init__()
        self.choose, self.before, self.layer, self.runs = choose, before or nn.Identity(), nn.Linear(3, 2), 0

    def forward(self, *inputs: Any) -> Tensor:
        self.runs += 1
        return self.layer(self.before(self.choose(*inputs)))


# --- refused ----------------------------------------------------------------------------------------------

MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of other samples": lambda x: x.flatten(0, 1).roll(1, 0),
    "samples in another order": lambda x: x.flip(0).flatten(0, 1),
    "views of other samples": lambda x: torch.cat([x[:, 0], x[:, 0].roll(1, 0)]),
    "one row too many of a sample": lambda x: torch.cat([x[:, :3].flatten(0, 1), x[:1, 0], x[2:, 3], x[3:, 4]]),
    "tokens chosen among all": lambda x: x.flatten(0, 1)[x.flatten(0, 1)[:, 0].topk(2 * len(x)).indices],
    "what samples have in common": lambda x: (x - x.mean(0)).flatten(0, 1),
    "sorted by content": lambda x: x.flatten(0, 1)[x.flatten(0, 1)[:, 0].argsort()],
}


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_do_not_lie_by_samples_are_refused(name: str) -> None:
    model, x = Rows(MIXED[name]), torch.randn(B, 6, 3)
    with pytest.raises(ValueError, match=r"layer 'layer'.*trial with other samples did not tell.*persample\.Folded"):
        sizes_of(model, x)
    assert sizes_of(model, x, batch_axis={"layer": 0})["layer"] == len(MIXED[name](x))  # each row a sample


def test_views_of_which_the_second_belong_to_others() -> None:
    """The first input alone would agree with views by turns; the rows that it leaves alone say nothing."""
    model = Rows(lambda first, second: torch.cat([first, second.flip(0)]))
    with pytest.raises(ValueError, match="did not tell how to read its rows"):
        sizes_of(model, torch.randn(B, 3), torch.randn(B, 3))


def test_windows_as_long_as_the_batch_are_no_samples() -> None:
    """[windows of all samples, B positions, C]: axis 1 has as many entries as there are samples, and counts none."""
    model = Rows(lambda x: x.flatten(0, 1))
    with reweight(model, lambda layer, grads: None) as handle:
        model(torch.randn(B, 3, B, 3)).sum().backward()
        assert handle.explain()["layer"] == "reweighted, samples of 3 consecutive rows each on axis 0 of its output"
    coupled = Rows(lambda x: (x - x.mean(0)).flatten(0, 1))
    with pytest.raises(ValueError, match=r"axis \[1\] has that size and axis \[0\] has a multiple"):
        sizes_of(coupled, torch.randn(B, 3, B, 3))


SELECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens of some samples": lambda x: x.flatten(0, 1)[torch.tensor([0, 1, 5, 14])],
    "tokens that stand out": lambda x: x[x[:, :, 0] > x[:, :, 0].flatten().sort().values[-len(x) - 1]],
}


SELECTED["tokens chosen among all"] = lambda x: x.flatten(0, 1)[x.flatten(0, 1)[:, 0].topk(len(x)).indices]


@pytest.mark.parametrize("name", SELECTED)
def test_as_many_rows_as_samples_that_belong_to_others(name: str) -> None:
    """The only axis with as many entries as samples, but not of these."""
    model = Rows(SELECTED[name])
    x = torch.randn(B, B, 3)
    with pytest.raises(ValueError, match=r"axis \[0\] has that size, and a trial .* rows that change with others"):
        sizes_of(model, x)
    assert sizes_of(model, x, batch_axis=0) == {"layer": B}


def test_selection_of_the_own_row_is_none_of_that() -> None:
    model = Rows(lambda x, last: x[torch.arange(len(x)), last])
    assert sizes_of(model, torch.randn(B, 6, 3), torch.randint(6, (B,))) == {"layer": B}
    assert model.runs == 1 + 3


# --- found in spite of what is in between -----------------------------------------------------------------


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "dropout": lambda: nn.Dropout(0.5),
    "layer norm": lambda: nn.LayerNorm(3),
    "both": lambda: nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)),
}


@pytest.mark.parametrize("name", NORMS)
def test_what_couples_or_is_random_in_training(name: str) -> None:
    """The pass, what it leaves in buffers, and the random numbers after it are those of a model on its own."""
    model, x = Rows(lambda x: x.flatten(0, 1), NORMS[name]()), torch.randn(B, 5, 3)
    alone = copy.deepcopy(model)
    torch.manual_seed(1)
    expected, random_number = alone(x), torch.rand(())
    torch.manual_seed(1)
    with reweight(model, lambda layer, grads: sizes.append(grads.batch_size)) as handle:
        sizes = list[int]()
        output = model(x)
        assert torch.equal(torch.rand(()), random_number)
        output.sum().backward()
        assert "samples of 5 consecutive rows" in handle.explain()["layer"]
    assert sizes == [B]
    torch.testing.assert_close(output, expected)
    assert all(torch.equal(value, alone.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_layers_that_python_and_numpy_leave_out_at_random() -> None:
    """A rehearsal draws what the next would draw."""

    def draw() -> tuple[float, float]:
        return random.random(), float(numpy.random.rand())  # noqa: NPY002 (what models use)

    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002
    with dry_run(nn.Identity()):
        first = draw()
    with dry_run(nn.Identity()):
        assert draw() == first
    assert draw() == first
    assert draw() != first


def test_batch_normalisation_on_frames_adds_up_to_the_batch_gradient() -> None:
    model, x = Frames(normalise=True), torch.randn(B, 3, 2, 4, 4)
    losses_of(model(x)).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with reweight(model, lambda layer, grads: torch.ones(grads.batch_size)):
        losses_of(model(x)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_an_input_that_the_model_does_not_take_changed() -> None:
    """Lengths that must fall: the trial is given up, and the size tells, as without it."""

    def choose(x: Tensor, lengths: Tensor) -> Tensor:
        if bool((lengths.diff() > 0).any()):
            raise RuntimeError("lengths must fall")
        return x

    assert sizes_of(Rows(choose), torch.randn(B, 2 * B, 3), torch.tensor([5, 4, 4, 2])) == {"layer": B}


@pytest.mark.parametrize("length", [B, 2 * B])
def test_what_is_no_tensor_and_masks_that_are_as_long_as_the_batch(length: int) -> None:
    model = Rows(lambda x, mask=None, scale=1.0: (x * scale + (0 if mask is None else mask[0, 0])).flatten(0, 1))
    assert sizes_of(model, torch.randn(B, length, 3), torch.randn(B, B), 2.0) == {"layer": B}
    assert sizes_of(model, torch.randn(B, length, 3), None, 2.0) == {"layer": B}


# --- when it runs -----------------------------------------------------------------------------------------


def test_one_axis_that_can_be_samples_is_not_tried() -> None:
    model = Rows(lambda x: x)
    sizes_of(model, torch.randn(B, 3, 3))
    assert model.runs == 1


def test_it_runs_once_for_each_shape() -> None:
    model, runs = Rows(lambda x: x.flatten(0, 1)), []
    with reweight(model, lambda layer, grads: None):
        for batch, length in ((B, 3), (B, 3), (B, 5), (2, 3), (B, 5), (1, 7), (B, 1), (16, 3)):
            before = model.runs
            model(torch.randn(batch, length, 3)).sum().backward()
            runs.append(model.runs - before - 1)
    # log₂ 4 bits, two runs for each, and one without a change; later one bit tells
    assert runs == [5, 0, 3, 3, 0, 0, 0, 3]


@settings(max_examples=8)
@given(shapes=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([2, 4])), min_size=2, max_size=4))
def test_property_batches_and_images_of_all_sizes(shapes: list[tuple[int, int]]) -> None:
    model = Swin()
    inputs = [torch.randn(batch, 2, size, size) for batch, size in shapes]
    expected = [rows_by_layer(model, x) for x in inputs]
    with reweight(model, lambda layer, grads: 1 / (1 + grads.norms())):
        for x, rows in zip(inputs, expected, strict=True):
            model.zero_grad()
            losses_of(model(x)).sum().backward()
            for layer in rows.values():
                c = 1 / (1 + torch.cat([row.flatten(1) for row in layer.values()], 1).norm(dim=1))
                for name, row in layer.items():
                    torch.testing.assert_close(model.get_parameter(name).grad, torch.tensordot(c, row, 1))


@pytest.mark.parametrize("kind", ["dictionary", "number"])
def test_rows_that_were_samples_are_folded_later(kind: str) -> None:
    """One window a sample in the first batch, and then three: told by what the model is called with."""
    model = Rows(lambda given, windows=1: (given["x"] if kind == "dictionary" else given).reshape(-1, 2, 3))
    explained = []
    with reweight(model, lambda layer, grads: torch.ones(B)) as handle:
        for windows in (1, 3):
            x = torch.randn(B, 2 * windows, 3) if kind == "dictionary" else torch.randn(B, 6, 3)
            if kind == "dictionary":
                model({"x": x}).sum().backward()
            else:
                model.choose = lambda x, number: x[:, : 2 * number].reshape(-1, 2, 3)
                model(x, windows).sum().backward()
            explained.append(handle.explain()["layer"])
    each = "samples of 3 consecutive rows each"
    assert explained == [f"reweighted, {what} on axis 0 of its output" for what in ("samples", each)]


def test_passes_that_are_under_way_at_once() -> None:
    """Both forward passes before either backward pass, of other sizes."""
    model, factors = Tokens(time_first=False), {B: torch.randn(B), 3: torch.randn(3)}
    inputs = [torch.randint(7, (B, 5)), torch.randint(7, (3, 6))]
    expected = [rows_by_layer(model, x) for x in inputs]
    with reweight(model, lambda layer, grads: factors[grads.batch_size]):
        losses = [losses_of(model(x)).sum() for x in inputs]
        sum(losses).backward()
    for path in ("inner", "head"):
        for name in expected[0][path]:
            want = sum(torch.tensordot(factors[len(x)], rows[path][name], 1) for x, rows in zip(inputs, expected,
                       strict=True))  # fmt: skip
            torch.testing.assert_close(model.get_parameter(name).grad, want)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_in_a_checkpoint() -> None:
    assert_exact(Checkpointed(Frames(), reentrant=False), torch.randn(B, 3, 2, 4, 4))


@pytest.mark.parametrize("given", [False, True])
def test_in_a_reentrant_checkpoint(given: bool) -> None:
    """Its layers run without gradients first, and again in the backward pass."""
    inner, x = Frames(), torch.randn(B, 3, 2, 4, 4, requires_grad=True)
    expected, c = rows_by_layer(inner, x), torch.randn(B)
    model = Checkpointed(inner, reentrant=True)
    where = {f"inner.{name}": Folded() for name in ("conv", "up", "mix", "project")} | {"inner.head": 0}
    with reweight(model, lambda layer, grads: c, batch_axis=where if given else None):
        for _ in range(2):
            model.zero_grad()
            losses_of(model(x)).sum().backward()
            for path in expected:
                for name, row in expected[path].items():
                    torch.testing.assert_close(inner.get_parameter(name).grad, torch.tensordot(c, row, 1))


def test_a_reentrant_checkpoint_that_may_be_of_two_passes() -> None:
    """As many rows in both, of other numbers of samples: which of them is recomputed, nobody says."""
    model = Checkpointed(Rows(lambda x: x.flatten(0, 1)), reentrant=True)
    inputs = [torch.randn(*sizes, 3, requires_grad=True) for sizes in ((B, 3), (3, B))]
    with reweight(model, lambda layer, grads: torch.ones(grads.batch_size)):
        losses = [model(x).sum() for x in inputs]
        with pytest.raises(ValueError, match=r"the batch size is unknown at layer 'inner\.layer'"):
            losses[0].backward()


def test_under_autocast() -> None:
    model, x, c = Frames().float(), torch.randn(B, 3, 2, 4, 4).float(), torch.arange(4.0).float()
    expected = rows_by_layer(model, x)
    with reweight(model, lambda layer, grads: grads.gram().diagonal() * 0 + c):
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses_of(model(x).float()).sum()
        loss.backward()
    for path in expected:
        for name, row in expected[path].items():
            want = torch.tensordot(c, row, 1)
            assert float((model.get_parameter(name).grad - want).norm() / want.norm()) < 0.1, name


# --- given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Folded(after=3), r"shape \[20, 2\] in a batch of 4 samples.*Folded\(before=1, after=3, axis=0\)"),
        (Folded(before=2, after=2), "axis 0 must hold before · batch · after rows"),
        (Folded(axis=1), "does not agree"),
    ],
)
def test_what_does_not_fit_is_refused(given: Folded, message: str) -> None:
    model = Rows(lambda x: x.flatten(0, 1))
    with pytest.raises(ValueError, match=message):
        sizes_of(model, torch.randn(B, 5, 3), batch_axis={"layer": given})


def test_impossible_foldings() -> None:
    with pytest.raises(ValueError, match=r"says nothing: give one of them, after=1"):
        Folded(before=None)
    with pytest.raises(ValueError, match=r"before and after are 1 or more, or None"):
        Folded(after=0)
    with pytest.raises(ValueError, match=r"axes count from the front"):
        Folded(axis=-1)
    model = Fold(nn.Conv1d(1, 2, 1), 1, 2, (1, 3))
    with pytest.raises(ValueError, match="a convolution has its samples on axis 0"):
        reweight(model, lambda layer, grads: None, batch_axis={"layer": Folded(axis=1)})


def test_one_for_all_layers() -> None:
    model = Frames()
    assert set(sizes_of(model, torch.randn(B, 3, 2, 4, 4), batch_axis=Folded()).values()) == {B}
