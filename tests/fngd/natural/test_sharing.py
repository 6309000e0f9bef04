"""FNGD keeps coefficients by position or by sample: which it uses, when it computes them anew, how it resumes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from checkpoints import reloaded
from coefficients import assert_close, data, directions, explicit, own_gradients, run
from hypothesis import given
from hypothesis import strategies as st
from natural import LAYERS, matrix
from preconditioned import Net
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import FNGD

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("share", ["position", "sample"])
def test_controls(share: str) -> None:
    model, (batch,) = Net(), data(6)
    more = {"samples": 6} if share == "sample" else {}

    def first_and_second(control: str | None, seed: int = 0) -> list[dict[str, Tensor]]:
        net = copy.deepcopy(model)
        opt = FNGD(net, lr=0.0, alpha=1e-3, steps_per_epoch=1, control=control, seed=seed, share=share, **more)
        seen = []
        for _ in range(2):
            if share == "sample":
                opt.next_batch(torch.arange(6))
            seen.append(run(net, opt, batch))
        return seen

    rows = own_gradients(model, batch)
    computed, permuted, other = first_and_second(None), first_and_second("permuted"), first_and_second("permuted", 1)
    for seen in first_and_second("constant"):
        assert_close(seen, directions(rows, {}))
    for first, second in (computed, permuted, other):
        assert_close(second, first)  # once permuted, always the same
    assert_close(computed[0], directions(rows, explicit(rows, 1e-3)))
    again = first_and_second("permuted")
    for name in ("conv.weight", "inner.weight", "head.weight"):
        assert torch.equal(again[0][name], permuted[0][name])
        assert not torch.allclose(permuted[0][name], computed[0][name])
        assert not torch.allclose(permuted[0][name], other[0][name])
        layer = name.split(".")[0]
        c = explicit(rows, 1e-3)[layer]
        # The same coefficients in another order: solve for the ones that were used.
        u = matrix(rows, layer)
        seen = torch.cat([grad.flatten() for key, grad in permuted[0].items() if key.startswith(layer + ".")])
        used = torch.linalg.lstsq(u, seen[:, None]).solution[:, 0]
        if torch.linalg.matrix_rank(u) == 6:
            torch.testing.assert_close(used.sort().values, c.sort().values, rtol=1e-6, atol=1e-9)


def test_refresh() -> None:
    model, (batch,) = Net(), data(4)
    opt = FNGD(model, lr=0.05, steps_per_epoch=1, refresh_epochs=2)
    fresh = {}
    for epoch in range(5):
        rows = own_gradients(model, batch)
        if epoch % 2 == 0:
            fresh = explicit(rows, 1e-2)
        assert_close(run(model, opt, batch), directions(rows, fresh))


def test_sharing_by_sample() -> None:
    model, (batch,) = Net(), data(6)
    opt = FNGD(model, lr=0.01, steps_per_epoch=2, share="sample", samples=7)
    x, y = batch
    table: dict[str, Tensor] = {layer: torch.full((7,), torch.nan) for layer in LAYERS}
    for ids in (torch.tensor([4, 0, 2]), torch.tensor([5, 1, 3])):
        part = x[ids], y[ids]
        rows = own_gradients(model, part)
        for layer, c in explicit(rows, 1e-2).items():
            table[layer][ids] = 3 * c
        opt.next_batch(ids)
        run(model, opt, part)
    # Other batches, of another size; sample 6 was never met and counts as in the plain gradient.
    ids = torch.tensor([1, 2, 6, 4])
    part = x[[1, 2, 5, 4]], y[[1, 2, 5, 4]]
    rows = own_gradients(model, part)
    opt.next_batch(ids)
    expected = {layer: factors[ids].nan_to_num(1.0) / 4 for layer, factors in table.items()}
    assert_close(run(model, opt, part), directions(rows, expected))


@pytest.mark.parametrize("accumulate", ["separate", "joint"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_pass_without_ids_of_its_own_is_named(accumulate: str, stored: bool) -> None:
    model, (batch,) = Net(), data(4)
    opt = FNGD(model, lr=0.0, steps_per_epoch=1, share="sample", samples=4, accumulate=accumulate)

    def step(announced: list[bool]) -> dict[str, Tensor]:
        opt.zero_grad()
        for each in announced:
            if each:
                opt.next_batch(torch.arange(4))
            (F.cross_entropy(model(batch[0]), batch[1]) / 2).backward()
        opt.step()
        return {name: each.grad.clone() for name, each in model.named_parameters()}

    expected = step([True, True])
    if not stored:
        opt._table.epoch = 0  # computes again
    with pytest.warns(UserWarning, match=r"backward pass 2 of a step has no sample ids .* call opt.next_batch"):
        assert_close(step([True, False]), expected)
    assert_close(step([True, False]), expected)  # said once


def test_several_forward_passes_of_one_loss_are_of_the_same_samples() -> None:
    model, ((x, y),) = Net(), data(4)
    opt = FNGD(model, lr=0.0, steps_per_epoch=1, share="sample", samples=4)
    for _ in range(2):
        opt.next_batch(torch.arange(4))
        F.cross_entropy(model(x) + model(x.flip(-1)), y).backward()
        opt.step()
        opt.zero_grad()
    opt.next_batch(torch.arange(4))  # a pass whose gradients are thrown away, as SAM's first is
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    opt.step()


def test_a_batch_with_nan_is_not_stored() -> None:
    model, (good,) = Net(), data(4)
    bad = good[0].clone(), good[1]
    bad[0][1, 0, 0, 0] = math.nan
    opt = FNGD(model, lr=0.0, momentum=0.0, alpha=1e-3, steps_per_epoch=1)
    opt.zero_grad()
    F.cross_entropy(model(bad[0]), bad[1]).backward()
    assert model.conv.weight.grad.isnan().any()
    opt.zero_grad()  # as a GradScaler does: no step; the batch is over all the same
    rows = own_gradients(model, good)
    for _ in range(2):  # computed in the second epoch, stored from the third on
        assert_close(run(model, opt, good), directions(rows, explicit(rows, 1e-3)))


@pytest.mark.filterwarnings("ignore:zero_grad.. of the optimiser follows:UserWarning")
def test_a_skipped_step_does_not_shift_the_batches_after_it() -> None:
    model, batches = Net(), data(4, 3)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=2)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()  # the scaler met inf: no step
    run(model, opt, batches[1])
    for batch in batches:  # of sizes 4 and 3 again; the parameters have not moved
        rows = own_gradients(model, batch)
        assert_close(run(model, opt, batch), directions(rows, explicit(rows, 1e-3)))


def test_epochs_that_are_announced_may_be_short() -> None:
    model, batches = Net(), data(4, 3)
    opt = FNGD(model, lr=0.0, steps_per_epoch=5)
    seen = []
    for _ in range(2):
        opt.start_epoch()
        seen.append([run(model, opt, batch) for batch in batches])
    for first, second in zip(*seen, strict=True):
        assert_close(second, first)


def test_stored_steps_compute_no_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (batch,) = Net(), data(4)
    opt = FNGD(model, lr=0.0, steps_per_epoch=1)
    run(model, opt, batch)
    monkeypatch.setattr("fngd.natural.solve.directions.smw_coefficients", lambda *a, **k: pytest.fail("computed again"))
    run(model, opt, batch)


@given(
    stop=st.integers(0, 7), share=st.sampled_from(["position", "sample"]), control=st.sampled_from([None, "permuted"])
)
def test_resuming_goes_on_bit_for_bit(stop: int, share: str, control: str | None) -> None:
    start, batches = Net(), data(4, 4, 2)
    more = {"samples": 10} if share == "sample" else {}

    def build(net: nn.Module) -> FNGD:
        return FNGD(net, lr=0.1, steps_per_epoch=3, refresh_epochs=2, control=control, share=share, **more)

    def steps(net: nn.Module, opt: FNGD, numbers: range) -> None:
        for number in numbers:
            if share == "sample":
                opt.next_batch(torch.arange(10).split([4, 4, 2])[number % 3])
            run(net, opt, batches[number % 3])

    whole = copy.deepcopy(start)
    steps(whole, build(whole), range(8))

    before = copy.deepcopy(start)
    opt = build(before)
    steps(before, opt, range(stop))
    saved = reloaded({"model": before.state_dict(), "opt": opt.state_dict()})
    after = Net()
    after.load_state_dict(saved["model"])
    resumed = build(after)
    resumed.load_state_dict(saved["opt"])
    steps(after, resumed, range(stop, 8))
    for p, q in zip(whole.parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_group_that_is_switched_off_later_takes_the_plain_gradient() -> None:
    """Though coefficients for it are stored."""
    model, (batch,) = Net(), data(6)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=1)
    rows = own_gradients(model, batch)
    assert_close(run(model, opt, batch), directions(rows, explicit(rows, 1e-3)))
    for group in opt.param_groups:
        group["precondition"] = False
    assert_close(run(model, opt, batch), directions(rows, {}))
