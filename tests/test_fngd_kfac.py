"""KFAC: its direction is that of A ⊗ G built and inverted densely; averages, frequencies, clip, resume, NaN."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preconditioned import Net, Positions, batch, check_resume, close, problems, train
from torch import Tensor, nn
from torch.nn import functional as F

from fngd.eva import Eva
from fngd.kfac import KFAC, damped_inverse, symmetric_eigen
from fngd.kl_clip import kl_clip_factor
from fngd.skfac import SKFAC


def factors(problem: Positions) -> tuple[Tensor, Tensor]:
    """A and G, group by group, summed over samples and positions one at a time."""
    x, z = problem.rows()
    groups, count, time, _ = x.shape
    a, g = torch.zeros(groups, x.shape[3], x.shape[3]).to(x), torch.zeros(groups, z.shape[3], z.shape[3]).to(x)
    for group in range(groups):
        for b in range(count):
            for t in range(time):
                a[group] += torch.outer(x[group, b, t], x[group, b, t]) / count
                g[group] += torch.outer(z[group, b, t], z[group, b, t]) / (count * time)
    return a, g


def dense_direction(a: Tensor, g: Tensor, grad: Tensor, damping: float) -> Tensor:
    """(G ⊗ A + γI)⁻¹ vec(g), each group by the dense inverse."""
    result = []
    for a_k, g_k, grad_k in zip(a, g, grad, strict=True):
        fisher = torch.kron(g_k, a_k)
        eye = torch.eye(len(fisher)).to(fisher)
        result.append(torch.linalg.solve(fisher + damping * eye, grad_k.flatten()).view_as(grad_k))
    return torch.stack(result)


@given(problem=problems(), damping=st.floats(1e-2, 10), reduction=st.sampled_from(["mean", "sum"]))
def test_direction_is_the_dense_one(problem: Positions, damping: float, reduction: str) -> None:
    a, g = factors(problem)
    scale = 1 if reduction == "mean" else len(problem.x)
    expected = dense_direction(a, g, problem.mean_gradient() * scale, damping)
    close(problem.step_direction(KFAC, damping=damping, reduction=reduction), expected)


@given(problem=problems(), damping=st.floats(1e-2, 10))
def test_cholesky_with_pi_is_the_dense_one(problem: Positions, damping: float) -> None:
    a, g = factors(problem)
    expected = []
    for a_k, g_k, grad in zip(a, g, problem.mean_gradient(), strict=True):
        mean_a, mean_g = a_k.trace() / len(a_k), g_k.trace() / len(g_k)
        pi = (mean_a / mean_g).sqrt() if mean_a > 0 and mean_g > 0 else 1.0
        damped_a = a_k + pi * math.sqrt(damping) * torch.eye(len(a_k)).to(a_k)
        damped_g = g_k + math.sqrt(damping) / pi * torch.eye(len(g_k)).to(a_k)
        expected.append(torch.linalg.inv(damped_g) @ grad @ torch.linalg.inv(damped_a))
    close(problem.step_direction(KFAC, damping=damping, inverse="cholesky"), torch.stack(expected))


@given(problem=problems(), damping=st.floats(1e-4, 1))
def test_preset_is_what_the_public_code_computes(problem: Positions, damping: float) -> None:
    x, z = problem.rows()
    count, time = x.shape[1:3]
    spatial = 1 if isinstance(problem.layer, nn.Linear) else time
    x, z = x.flatten(1, 2) / spatial, z.flatten(1, 2) / count / spatial
    eye_a, eye_g = torch.eye(x.shape[2]).to(x), torch.eye(z.shape[2]).to(x)
    a = 0.95 * eye_a + 0.05 * x.mT @ x / (count * time)
    g = 0.95 * eye_g + 0.05 * z.mT @ z / (count * time)
    expected = dense_direction(a, g, problem.mean_gradient(), damping)
    close(problem.step_direction(KFAC, damping=damping, preset="kfac-pytorch"), expected)


@given(problem=problems())
def test_heavy_damping_is_the_plain_gradient(problem: Positions) -> None:
    close(problem.step_direction(KFAC, damping=1e12, lr=1e12), problem.mean_gradient())


@pytest.mark.usefixtures("double")
def test_layer_called_twice_has_one_pair_of_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[..., ::2])

    model, x = Twice(), torch.randn(5, 2, 6)
    opt = KFAC(model)
    model(x).square().flatten(1).sum(1).mean().backward()
    opt.step()
    middle = (model.conv(x)[..., ::2]).detach()
    assert opt._running["conv"]["inputs"][0, -1, -1] == 6 + 3, "1 · 1 at every position of both calls"
    assert middle.shape[-1] == 3


@pytest.mark.usefixtures("double")
def test_moving_average() -> None:
    model = nn.Linear(3, 2)
    opt = KFAC(model, lr=1e-3, average=0.6, kl_clip=None)
    expected: Any = None
    for k in range(1, 6):
        x = torch.randn(4, 3)
        rows = torch.cat([x, torch.ones(4, 1)], 1)
        model(x).square().sum(1).mean().backward()
        opt.step()
        opt.zero_grad()
        weight = min(1 - 1 / k, 0.6)
        new = rows.T @ rows / 4
        expected = new if expected is None else weight * expected + (1 - weight) * new
        close(opt._running[""]["inputs"][0], expected, 1e-12)


@pytest.mark.usefixtures("double")
def test_frequencies_are_honoured() -> None:
    model = Net()
    opt = KFAC(model, lr=1e-3, statistics_every=2, inverse_every=3)
    factors_changed, inverses_changed = [], []
    before: Any = (None, None)
    for step in range(12):
        train(model, opt, range(step, step + 1))
        now = (opt._running["inner"]["inputs"], opt._inverses["inner"]["q_a"])
        for changed, old, new in zip((factors_changed, inverses_changed), before, now, strict=True):
            changed.append(old is None or not torch.equal(old, new))
        before = now
    assert factors_changed == [step % 2 == 0 for step in range(12)]
    assert inverses_changed == [step % 3 == 0 for step in range(12)]


@given(rates=st.lists(st.floats(1e-3, 10), min_size=1, max_size=4), kappa=st.floats(1e-6, 1e3))
def test_kl_clip_formula(rates: list[float], kappa: float) -> None:
    inner = [torch.tensor(float(n + 1), dtype=torch.float64) for n in range(len(rates))]
    total = sum(rate**2 * (n + 1) for n, rate in enumerate(rates))
    assert kl_clip_factor(inner, rates, kappa).item() == pytest.approx(min(1, math.sqrt(kappa / total)))


def test_kl_clip_of_nothing_is_one() -> None:
    assert kl_clip_factor([torch.zeros(())], [0.1], 1e-3).item() == 1
    assert kl_clip_factor([torch.ones(())], [0.0], 1e-3).item() == 1


@pytest.mark.usefixtures("double")
def test_schedule_changes_the_clip() -> None:
    """Two groups with rates of their own; the length of the step follows the rate of this very step."""
    model = Net()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    groups = [
        {"params": [*model.conv.parameters(), *model.norm.parameters(), model.scale], "lr": 0.5},
        {"params": [*model.inner.parameters(), *model.head.parameters()], "lr": 0.2},
    ]
    opt = KFAC(model, groups, momentum=0.0, kl_clip=1e-5, damping=0.1)
    free = KFAC(copy := Net(), lr=1.0, momentum=0.0, kl_clip=None, damping=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (1.0, 0.1)[min(step, 1)])
    for factor in (1.0, 0.1):
        model.load_state_dict(start)
        copy.load_state_dict(start)
        for net, optimizer in ((model, opt), (copy, free)):
            x, y = batch(0)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        layers = ("conv", "inner", "head")
        rates = {name: factor * (0.5 if name.split(".")[0] in ("conv", "norm", "scale") else 0.2) for name in start}
        v = {name: start[name] - value for name, value in copy.state_dict().items()}
        total = sum(
            rates[n] ** 2 * (v[n] * p.grad).sum() for n, p in copy.named_parameters() if n.split(".")[0] in layers
        )
        nu = min(1.0, math.sqrt(1e-5 / total))
        assert nu < 1
        for name, value in model.state_dict().items():
            clipped = nu if name.split(".")[0] in layers else 1.0
            close(start[name] - value, rates[name] * clipped * v[name], 1e-9)
        scheduler.step()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"inverse": "cholesky", "other": "adamw"}, {"preset": "kfac-pytorch"}])
def test_resume_is_bit_for_bit(seed: int, options: dict[str, Any]) -> None:
    check_resume(lambda model: KFAC(model, lr=0.05, statistics_every=2, inverse_every=3, **options), seed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_bad_batch_leaves_the_factors(bad: float, inverse: str) -> None:
    model = Net()
    opt = KFAC(model, lr=0.05, inverse_every=1, inverse=inverse)
    train(model, opt, range(3))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = {layer: {k: v.clone() for k, v in state.items()} for layer, state in opt._running.items()}
    x, y = batch(3)
    x[0, 0, 0, 0] = bad
    F.cross_entropy(model(x), y).backward()
    opt.step()  # what a loop without a GradScaler does
    opt.zero_grad()
    for layer, state in before.items():
        for name, value in state.items():
            assert torch.equal(opt._running[layer][name], value), (layer, name)
    model.load_state_dict(weights)
    opt.state.clear()
    train(model, opt, range(4, 6))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_bad_first_batch_takes_the_plain_gradient_until_the_next_inverse() -> None:
    model = nn.Linear(2, 1)
    opt = KFAC(model, lr=1.0, momentum=0.0, kl_clip=None)
    model(torch.tensor([[math.nan, 1.0]])).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # as if it had been repaired
    opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.ones_like(p))


def test_skipped_step_leaves_nothing() -> None:
    """A GradScaler that meets inf calls no step; the next batch starts afresh."""
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    opt, other = KFAC(model, lr=0.05), KFAC(clean, lr=0.05)
    x, y = batch(7)
    F.cross_entropy(model(x * math.inf), y).backward()
    opt.zero_grad()
    train(model, opt, range(2))
    train(clean, other, range(2))
    for name, value in clean.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.usefixtures("double")
def test_grad_scaler_changes_nothing() -> None:
    """Scaled losses, unscaled gradients: the factors are those of the true loss."""
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    opt, other = KFAC(model, lr=0.05, scaler=scaler), KFAC(clean, lr=0.05)
    for number in range(3):
        x, y = batch(number)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        F.cross_entropy(clean(x), y).backward()
        other.step()
        other.zero_grad()
    for name, value in clean.state_dict().items():
        close(model.state_dict()[name], value, 1e-10)


@pytest.mark.usefixtures("double")
def test_accumulation_has_the_factors_of_the_joined_batch() -> None:
    x, y = batch(0, 6)
    results = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        torch.manual_seed(0)
        opt = KFAC(model := Net(), lr=0.05)
        for part in parts:
            (F.cross_entropy(model(x[part]), y[part]) * (part.stop - part.start) / 6).backward()
        opt.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        close(results[1][name], value, 1e-10)


@pytest.mark.usefixtures("double")
def test_other_parameters_take_the_users_rule() -> None:
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    opt = KFAC(model, lr=0.3, other="adamw", other_options={"lr": 0.01, "betas": (0.8, 0.99)})
    plain = {name: p for name, p in clean.named_parameters() if name.split(".")[0] in ("norm", "scale")}
    adamw = torch.optim.AdamW(plain.values(), lr=0.01, betas=(0.8, 0.99))
    rest = [p for name, p in clean.named_parameters() if name not in plain]
    kfac = KFAC(clean, rest, lr=0.3)
    assert [group["rule"] for group in opt.param_groups] == ["sgd", "adamw"]
    for number in range(3):
        x, y = batch(number)
        for net, optimizers in ((model, [opt]), (clean, [adamw, kfac])):
            F.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            net.zero_grad()
    for name, value in clean.state_dict().items():
        close(model.state_dict()[name], value, 1e-12)


@pytest.mark.usefixtures("double")
def test_group_can_do_without() -> None:
    model, clean = Net(), Net()
    clean.load_state_dict(model.state_dict())
    opt = KFAC(model, [{"params": model.parameters(), "precondition": False}], lr=0.1, weight_decay=0.01)
    sgd = torch.optim.SGD(clean.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(model, opt, range(3))
    train(clean, sgd, range(3))
    for name, value in clean.state_dict().items():
        close(model.state_dict()[name], value, 1e-12)
    assert all(reason.startswith("plain") for reason in opt.explain().values())


def test_bias_without_its_weight_in_another_group() -> None:
    """A bias that is not preconditioned, and a frozen one, are no columns of A."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    groups = [
        {"params": [model[0].weight, *model[1].parameters()]},
        {"params": [model[0].bias], "precondition": False},
    ]
    opt = KFAC(model, groups, lr=0.1)
    model(torch.randn(5, 3)).square().mean().backward()
    opt.step()
    assert opt._running["0"]["inputs"].shape[-1] == 3
    assert opt._running["1"]["inputs"].shape[-1] == 4


def test_explain_says_what_stays_plain() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    opt = KFAC(model)
    model(torch.tensor([1, 2])).sum().backward()
    opt.step()
    assert opt.explain()["1"].startswith("preconditioned")
    assert opt.explain()["2"] == "plain: its weight is shared: 0.weight, 2.weight"
    opt.remove()
    up = nn.Sequential(nn.ConvTranspose1d(2, 2, 3), nn.Conv1d(2, 2, 3))
    opt = KFAC(up)
    up(torch.randn(2, 2, 5)).sum().backward()
    opt.step()
    assert "transposed" in opt.explain()["0"]
    assert list(opt._running) == ["1"]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("build", [KFAC, SKFAC, Eva])
def test_what_has_no_factors_takes_the_plain_gradient(build: Any) -> None:
    """Tied weights, a weight used without its layer, and a transposed convolution step as SGD does, and are named."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 3, stride=2, groups=1)
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.loose = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).mean(2)
            return F.linear(self.second(self.first(y).tanh()), self.loose.weight)

    model = Mixed()
    sgd = copy.deepcopy(model)
    opts = [build(model, lr=0.1, functions=False), torch.optim.SGD(sgd.parameters(), lr=0.1, momentum=0.9)]
    for _ in range(3):
        x = torch.randn(5, 2, 4)
        for net, opt in zip((model, sgd), opts, strict=True):
            opt.zero_grad()
            net(x).square().sum(1).mean().backward()
            opt.step()
    for name, value in sgd.named_parameters():
        close(model.get_parameter(name), value, 1e-12)
    reasons = opts[0].explain()
    assert "transposed" in reasons["up"]
    assert reasons["first"] == "plain: its weight is shared: first.weight, second.weight"
    assert reasons["loose"].startswith("plain")


def test_gradients_are_not_touched() -> None:
    model = Net()
    opt = KFAC(model, lr=0.1)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping=0.0; it must be a number > 0"),
        ({"damping": math.nan}, "damping=nan"),
        ({"average": 1.0}, "average=1.0; it must be at least 0 and less than 1"),
        ({"statistics_every": 0}, "statistics_every=0; it must be a whole number"),
        ({"inverse_every": -1}, "inverse_every=-1"),
        ({"kl_clip": -1.0}, "kl_clip=-1"),
        ({"inverse": "svd"}, r"choose one of \['eigen', 'cholesky'\]"),
        ({"preset": "x"}, "choose one of"),
        ({"reduction": "none"}, r"choose one of \['mean', 'sum'\]"),
        ({"other": "lion"}, r"choose one of \['sgd', 'adamw'\]"),
        ({"other_options": {"lr": 1.0}}, "give other='adamw'"),
        ({"other": "adamw", "other_options": {"beta": 1.0}}, "AdamW takes"),
        ({"lr": -1.0}, "lr=-1.0; it must be at least 0"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=True needs momentum"),
        ({"scaler": 3}, "it must be the GradScaler"),
    ],
)
def test_nonsense_is_refused_and_leaves_no_hooks(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        KFAC(model, **options)
    KFAC(model).remove()


def test_foreign_states_are_refused() -> None:
    model = nn.Linear(3, 2)
    opt = KFAC(model)
    with pytest.raises(ValueError, match="Load what its own state_dict"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    other = nn.Sequential(nn.Linear(3, 2))
    trained = KFAC(other)
    other(torch.randn(2, 3)).sum().backward()
    trained.step()
    with pytest.raises(ValueError, match="this model's layers are"):
        opt.load_state_dict(trained.state_dict())


def test_eigen_falls_back_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def fails_in_single(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    values, vectors = symmetric_eigen(torch.diag(torch.tensor([1.0, 2.0])))
    assert values.dtype == vectors.dtype == torch.float32
    assert values.tolist() == [1.0, 2.0]


def test_indefinite_matrix_falls_back_to_the_damping() -> None:
    matrix = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    torch.testing.assert_close(damped_inverse(matrix, 0.5), 2 * torch.eye(2))
