"""FNGD and NGD in the ordinary loop: their gradients are U c, built here sample by sample."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import FNGD, NGD, smw_coefficients

Batch = tuple[Tensor, Tensor]


class Small(nn.Module):
    """A convolution, a linear layer with positions, one without, a normalisation and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.inner = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.inner(x)).tanh().mean(1) * self.scale)


LAYERS = ("conv", "inner", "head")


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(*sizes: int) -> list[Batch]:
    return [(torch.randn(size, 2, 4, 3), torch.randint(3, (size,))) for size in sizes]


def run(model: nn.Module, opt: torch.optim.Optimizer, batch: Batch, reduction: str = "mean") -> dict[str, Tensor]:
    """One turn of the loop; the gradients that the step saw."""
    opt.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1], reduction=reduction).backward()
    seen = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.step()
    return seen


def own_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The gradient of each sample's own loss: name -> [B, *shape]."""
    clean = Small()
    clean.load_state_dict(model.state_dict())
    rows = []
    for x, y in zip(*batch, strict=True):
        loss = F.cross_entropy(clean(x[None]), y[None])
        rows.append(torch.autograd.grad(loss, list(clean.parameters())))
    return {
        name: torch.stack(row) for (name, _), row in zip(clean.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def layer_matrix(rows: dict[str, Tensor], layer: str) -> Tensor:
    """U [N, B]."""
    return torch.cat([row.flatten(1) for name, row in rows.items() if name.startswith(layer + ".")], 1).T


def directions(rows: dict[str, Tensor], coefficients: dict[str, Tensor], reduction: str = "mean") -> dict[str, Tensor]:
    """U c in the layers, the plain gradient elsewhere (for a sum, both times B)."""
    batch = len(next(iter(rows.values())))
    mean = torch.full((batch,), 1 / batch)
    scale = 1 if reduction == "mean" else batch
    return {
        name: scale * torch.tensordot(coefficients.get(name.split(".")[0], mean), row, 1) for name, row in rows.items()
    }


def explicit(rows: dict[str, Tensor], alpha: float, scale: str = "absorb") -> dict[str, Tensor]:
    """Coefficients from the dense N × N inverse, as the c of least norm with U c = d… from U itself."""
    result = {}
    for layer in LAYERS:
        u = layer_matrix(rows, layer)
        lam = alpha * (u.T @ u).norm()
        batch = u.shape[1]
        c = torch.linalg.inv(u.T @ u + lam * batch * torch.eye(batch)) @ torch.ones(batch)
        dense = torch.linalg.inv(lam * torch.eye(len(u)) + u @ u.T / batch) @ u.mean(1)
        torch.testing.assert_close(u @ c, dense)
        result[layer] = c * lam if scale == "absorb" else c
    return result


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: relative deviation {error:.1e}"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", ["absorb", "per_layer"])
@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0])
def test_gradients_in_the_first_epoch_and_with_stored_coefficients(alpha: float, scale: str, reduction: str) -> None:
    model, batches = Small(), data(5, 5, 3)
    opt = FNGD(model, lr=1e-3, alpha=alpha, scale=scale, reduction=reduction, steps_per_epoch=3)
    stored = []
    for batch in batches:
        rows = own_gradients(model, batch)
        stored.append(explicit(rows, alpha, scale))
        assert_close(run(model, opt, batch, reduction), directions(rows, stored[-1], reduction))
    for coefficients, size in zip(stored, (5, 5, 3), strict=True):  # other samples, the shorter last batch too
        (batch,) = data(size)
        rows = own_gradients(model, batch)
        assert_close(run(model, opt, batch, reduction), directions(rows, coefficients, reduction))
    opt.remove()


def test_ngd_computes_anew_in_every_step_and_takes_any_batch_size() -> None:
    model = Small()
    opt = NGD(model, lr=1e-3, alpha=1e-3)
    for batch in data(4, 6, 2, 1):
        rows = own_gradients(model, batch)
        assert_close(run(model, opt, batch), directions(rows, explicit(rows, 1e-3)))


def test_without_sharing_fngd_is_ngd() -> None:
    first, batches = Small(), data(4, 5)
    second = copy.deepcopy(first)
    a, b = FNGD(first, lr=0.1, share=None), NGD(second, lr=0.1)
    for batch in batches:
        run(first, a, batch)
        run(second, b, batch)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["fngd", "ngd"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        {"momentum": 0.0, "weight_decay": 1e-2},
    ],
)
def test_heavy_damping_is_torch_sgd_step_for_step(kind: str, options: dict[str, Any]) -> None:
    plain, batches = Small(), data(5, 5, 2)
    model = copy.deepcopy(plain)
    more = {"steps_per_epoch": 3} if kind == "fngd" else {}
    opt = {"fngd": FNGD, "ngd": NGD}[kind](model, lr=0.1, alpha=math.inf, **options, **more)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, **options)
    for batch in batches * 3:
        run(model, opt, batch)
        run(plain, sgd, batch)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_decoupled_weight_decay_is_that_of_adamw() -> None:
    plain, batches = Small(), data(5, 5)
    model = copy.deepcopy(plain)
    opt = NGD(model, lr=0.1, alpha=math.inf, weight_decay=0.03, decoupled_weight_decay=True)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for batch in batches * 2:
        run(model, opt, batch)
        before = [p.detach().clone() for p in plain.parameters()]
        run(plain, sgd, batch)
        with torch.no_grad():
            for p, old in zip(plain.parameters(), before, strict=True):
                p.sub_(0.1 * 0.03 * old)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_parameter_groups_and_schedulers() -> None:
    plain, batches = Small(), data(4, 4, 4, 4)
    model = copy.deepcopy(plain)

    def groups(net: Small) -> list[dict[str, Any]]:
        head = list(net.head.parameters())
        rest = [p for p in net.parameters() if all(p is not h for h in head)]
        return [{"params": rest, "weight_decay": 0.1}, {"params": head, "lr": 0.5, "momentum": 0.0}]

    opt = FNGD(model, groups(model), lr=0.1, alpha=math.inf, steps_per_epoch=4)
    sgd = torch.optim.SGD(groups(plain), lr=0.1, momentum=0.9)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, max_lr=[0.3, 0.1], total_steps=4, cycle_momentum=False)
        for each in (opt, sgd)
    ]
    for batch in batches:
        run(model, opt, batch)
        run(plain, sgd, batch)
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_zero_gradients_and_a_batch_of_one() -> None:
    model = Small()
    opt = FNGD(model, lr=0.1, momentum=0.0, steps_per_epoch=2)
    before = [p.detach().clone() for p in model.parameters()]
    (model(data(4)[0][0]) * 0).sum().backward()
    opt.step()
    opt.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    (batch,) = data(1)
    rows = own_gradients(model, batch)
    got = run(model, opt, batch)
    assert_close(got, directions(rows, {layer: torch.tensor([0.01 / 1.01]) for layer in LAYERS}))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("share", ["position", "sample"])
def test_controls(share: str) -> None:
    model, (batch,) = Small(), data(6)
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
        u = layer_matrix(rows, layer)
        seen = torch.cat([grad.flatten() for key, grad in permuted[0].items() if key.startswith(layer + ".")])
        used = torch.linalg.lstsq(u, seen[:, None]).solution[:, 0]
        if torch.linalg.matrix_rank(u) == 6:
            torch.testing.assert_close(used.sort().values, c.sort().values, rtol=1e-6, atol=1e-9)


def test_refresh() -> None:
    model, (batch,) = Small(), data(4)
    opt = FNGD(model, lr=0.05, steps_per_epoch=1, refresh_epochs=2)
    fresh = {}
    for epoch in range(5):
        rows = own_gradients(model, batch)
        if epoch % 2 == 0:
            fresh = explicit(rows, 1e-2)
        assert_close(run(model, opt, batch), directions(rows, fresh))


def test_sharing_by_sample() -> None:
    model, (batch,) = Small(), data(6)
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


def test_accumulation_has_coefficients_for_each_backward_pass() -> None:
    model, batches = Small(), data(4, 4)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=1)
    for _ in range(2):
        opt.zero_grad()
        expected: dict[str, Tensor] = {}
        for batch in batches:
            rows = own_gradients(model, batch)
            for name, value in directions(rows, explicit(rows, 1e-3)).items():
                expected[name] = expected.get(name, 0) + value
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
        opt.step()


def test_a_batch_with_nan_is_not_stored() -> None:
    model, (good,) = Small(), data(4)
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


def test_a_skipped_step_does_not_shift_the_batches_after_it() -> None:
    model, batches = Small(), data(4, 3)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=2)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()  # the scaler met inf: no step
    run(model, opt, batches[1])
    for batch in batches:  # of sizes 4 and 3 again; the parameters have not moved
        rows = own_gradients(model, batch)
        assert_close(run(model, opt, batch), directions(rows, explicit(rows, 1e-3)))


def test_closure_and_loss() -> None:
    model, (batch,) = Small(), data(4)
    opt = FNGD(model, lr=0.1, steps_per_epoch=1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0]


@given(
    stop=st.integers(0, 7), share=st.sampled_from(["position", "sample"]), control=st.sampled_from([None, "permuted"])
)
def test_resuming_goes_on_bit_for_bit(stop: int, share: str, control: str | None) -> None:
    start, batches = Small(), data(4, 4, 2)
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
    file = io.BytesIO()
    torch.save({"model": before.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    after = Small()
    after.load_state_dict(saved["model"])
    resumed = build(after)
    resumed.load_state_dict(saved["opt"])
    steps(after, resumed, range(stop, 8))
    for p, q in zip(whole.parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q)


def test_remove_leaves_plain_gradients() -> None:
    model, (batch,) = Small(), data(4)
    opt = FNGD(model, lr=0.0, steps_per_epoch=1)
    assert opt.explain()["conv"].startswith("plain so far")
    run(model, opt, batch)
    assert opt.explain()["conv"].startswith("reweighted")
    opt.remove()
    opt.remove()
    assert_close(run(model, opt, batch), directions(own_gradients(model, batch), {}))
    NGD(model)  # and the model is free again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"steps_per_epoch=None.*give len\(loader\)"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0; it must be a whole number"),
        ({"steps_per_epoch": 1, "lr": -1.0}, "lr=-1.0"),
        ({"steps_per_epoch": 1, "momentum": -0.1}, "momentum=-0.1"),
        ({"steps_per_epoch": 1, "momentum": 0.0, "nesterov": True}, "nesterov=True needs momentum"),
        ({"steps_per_epoch": 1, "alpha": -1.0}, "alpha=-1.0; it must be > 0"),
        ({"steps_per_epoch": 1, "alpha": None}, "give exactly one"),
        ({"steps_per_epoch": 1, "scale": "x"}, "scale='x' is unknown"),
        ({"steps_per_epoch": 1, "reduction": "none"}, r"reduction='none' is unknown; choose one of \['mean', 'sum'\]"),
        ({"steps_per_epoch": 1, "share": "x"}, "share='x' is unknown"),
        ({"steps_per_epoch": 1, "control": "x"}, "control='x' is unknown"),
        ({"steps_per_epoch": 1, "refresh_epochs": 0}, "refresh_epochs=0"),
        ({"steps_per_epoch": 1, "share": "sample"}, r"needs samples=len\(dataset\)"),
        ({"steps_per_epoch": 1, "samples": 3}, "nothing else does"),
        ({"share": None, "control": "constant"}, "need share="),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    model = Small()
    with pytest.raises(ValueError, match=message):
        FNGD(model, **options)
    assert not model.conv._forward_hooks, "a constructor that fails leaves the model alone"


def test_misuse_in_the_loop() -> None:
    model, batches = Small(), data(4, 4, 3)
    opt = FNGD(model, lr=0.0, steps_per_epoch=2)
    with pytest.raises(ValueError, match=r"reweighted already.*remove\(\)"):
        NGD(model)
    for batch in batches[:2]:
        run(model, opt, batch)
    with pytest.raises(
        ValueError, match=r"batch 1 of the epoch has 3 samples.*for 4\..*is steps_per_epoch=2 the length"
    ):
        run(model, opt, batches[2])
    with pytest.raises(ValueError, match="share='sample', but share is 'position'"):
        opt.next_batch(torch.arange(4))
    state = opt.state_dict()
    opt.remove()

    opt = FNGD(model, lr=0.0, steps_per_epoch=2)
    opt.start_epoch()
    for batch in batches[:2]:
        run(model, opt, batch)
    with pytest.raises(ValueError, match=r"batch 3 of an epoch, but steps_per_epoch is 2"):
        run(model, opt, batches[1])
    opt.remove()

    opt = FNGD(model, lr=0.0, steps_per_epoch=5)
    with pytest.raises(ValueError, match="steps_per_epoch=2, this optimiser 5"):
        opt.load_state_dict(state)
    with pytest.raises(ValueError, match="no 'coefficients'"):
        opt.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    opt.remove()

    opt = FNGD(model, lr=0.0, steps_per_epoch=5, share="sample", samples=9)
    with pytest.raises(ValueError, match=r"needs opt.next_batch\(sample_ids\)"):
        run(model, opt, batches[0])
    opt.next_batch(torch.arange(3))
    with pytest.raises(ValueError, match=r"3 sample ids, but layer 'head' has a batch of 4"):
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    with pytest.raises(ValueError, match="sample_ids must be integers"):
        opt.next_batch(torch.rand(3))
    opt.remove()
    opt = FNGD(model, lr=0.0, share=None)
    with pytest.raises(ValueError, match="share=None keeps no coefficients"):
        opt.start_epoch()


def test_epochs_that_are_announced_may_be_short() -> None:
    model, batches = Small(), data(4, 3)
    opt = FNGD(model, lr=0.0, steps_per_epoch=5)
    seen = []
    for _ in range(2):
        opt.start_epoch()
        seen.append([run(model, opt, batch) for batch in batches])
    for first, second in zip(*seen, strict=True):
        assert_close(second, first)


def test_stored_steps_compute_no_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (batch,) = Small(), data(4)
    opt = FNGD(model, lr=0.0, steps_per_epoch=1)
    run(model, opt, batch)
    monkeypatch.setattr("fngd.directions.smw_coefficients", lambda *a, **k: pytest.fail("computed again"))
    run(model, opt, batch)


def test_float32_model() -> None:
    torch.set_default_dtype(torch.float32)
    model, (batch,) = Small(), data(6)
    rows = {name: row.double() for name, row in own_gradients(model, batch).items()}
    torch.set_default_dtype(torch.float64)
    coefficients = {layer: smw_coefficients((u := layer_matrix(rows, layer)).T @ u, alpha=1e-4) for layer in LAYERS}
    expected = directions(rows, coefficients)
    torch.set_default_dtype(torch.float32)
    got = run(model, FNGD(model, lr=0.1, alpha=1e-4, steps_per_epoch=1), batch)
    assert_close({name: grad.double() for name, grad in got.items()}, expected, tolerance=1e-4)
