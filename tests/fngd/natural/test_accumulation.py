"""accumulate="joint": several backward passes are one batch; and AdamW for what is not preconditioned."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from natural import LAYERS, Small, blocks, close, cross_entropies, data, dense, grads_of, matrix, rows, vector
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import FNGD, NGD

pytestmark = pytest.mark.usefixtures("double")

Batch = tuple[Tensor, Tensor]


def accumulate(
    model: nn.Module, batch: Batch, sizes: list[int], *, reduction: str = "mean", factor: float = 1.0
) -> None:
    """Backward passes over parts of a batch whose losses add up to that of the batch."""
    for x, y in zip(*(part.split(sizes) for part in batch), strict=True):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        (factor * loss / (sum(sizes) if reduction == "mean" else 1)).backward()


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    log_alpha=st.floats(-3, 0.5),
    scale=st.sampled_from(["absorb", "per_layer", "graft"]),
    fisher=st.sampled_from(["empirical", "improved", "true"]),
    gram=st.sampled_from(["layer", "network"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_the_sum_is_the_direction_of_the_joined_batch(
    sizes: list[int], seed: int, log_alpha: float, scale: str, fisher: str, gram: str, reduction: str
) -> None:
    torch.manual_seed(seed)
    model, total = Small(), sum(sizes)
    x, y = data(total)
    labels = torch.randint(3, (total,))
    own, sampled = rows(model, x, cross_entropies(y)), rows(model, x, cross_entropies(labels))
    logits = model(x)
    (z,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    s = z.square().sum(1)
    opt = NGD(
        model, lr=0.0, alpha=10**log_alpha, scale=scale, fisher=fisher, gram=gram, reduction=reduction,
        accumulate="joint",
    )  # fmt: skip
    for part, target, drawn in zip(*(each.split(sizes) for each in (x, y, labels)), strict=True):
        outputs = model(part)
        if fisher == "true":
            opt.sample(outputs, cross_entropies(drawn))
        loss = F.cross_entropy(outputs, target, reduction="sum")
        (loss / (total if reduction == "mean" else 1)).backward()
    got, times = grads_of(model), total if reduction == "sum" else 1
    for layers in blocks(gram):
        u = matrix(own, *layers)
        v = matrix(sampled, *layers) if fisher == "true" else u
        right = u @ s / total if fisher == "improved" else u.mean(1)
        d = dense(v, right, lam=10**log_alpha * (v.T @ v).norm(), scale="absorb" if scale == "graft" else scale)
        if scale == "graft":
            d *= u.mean(1).norm() / d.norm()
        close(vector(got, *layers) / times, d)
    close(vector(got, "norm") / times, matrix(own, "norm").mean(1))
    opt.remove()


@pytest.mark.parametrize("share", ["position", "sample"])
@pytest.mark.parametrize("options", [{}, {"scale": "graft"}, {"gram": "network", "kl_clip": 1e-6}, {"scaler": True}])
def test_steps_are_those_of_the_joined_batch_with_stored_coefficients_too(share: str, options: dict[str, Any]) -> None:
    """Two steps an epoch, the second shorter; coefficients computed in the first epoch, reused in the second."""
    joint, factor = Small(), 1.0
    whole = copy.deepcopy(joint)
    batches, sizes = [data(7), data(3)], [[2, 4, 1], [1, 2]]
    common: dict[str, Any] = {"lr": 0.1, "alpha": 1e-3, "steps_per_epoch": 2, "share": share, **options}
    if share == "sample":
        common["samples"] = 10
    if common.pop("scaler", False):
        common["scaler"] = scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        factor = scaler.scale(torch.ones(())).item()
        common["scale"] = "per_layer"
        common["lr"] = 1e-6
    first, second = FNGD(joint, accumulate="joint", **common), FNGD(whole, **common)
    ids = torch.arange(10).split([7, 3])
    for _ in range(3):
        for number, (x, y) in enumerate(batches):
            for part, target, chosen in zip(*(each.split(sizes[number]) for each in (x, y, ids[number])), strict=True):
                if share == "sample":
                    first.next_batch(chosen)
                (factor * F.cross_entropy(joint(part), target, reduction="sum") / len(x)).backward()
            if share == "sample":
                second.next_batch(ids[number])
            (factor * F.cross_entropy(whole(x), y)).backward()
            for opt in (first, second):
                opt.step()
                opt.zero_grad()
            for p, q in zip(joint.parameters(), whole.parameters(), strict=True):
                close(p.detach(), q.detach())


def test_gradients_are_right_after_every_pass() -> None:
    """As DDP, clipping and early stops find them: `.grad` is the direction of the samples so far."""
    model, (x, y) = Small(), data(6)
    opt = NGD(model, lr=0.0, alpha=1e-2, accumulate="joint")
    for count in (2, 4, 6):
        accumulate(model, (x[count - 2 : count], y[count - 2 : count]), [2], reduction="sum")
        u = matrix(rows(model, x[:count], cross_entropies(y[:count])), "conv")
        close(vector(grads_of(model), "conv") / count, dense(u, u.mean(1), lam=1e-2 * (u.T @ u).norm()))
    opt.step()
    opt.zero_grad()
    accumulate(model, (x, y), [6])
    u = matrix(rows(model, x, cross_entropies(y)), "conv")
    close(vector(grads_of(model), "conv"), dense(u, u.mean(1), lam=1e-2 * (u.T @ u).norm()))


def test_separate_passes_remain_the_default() -> None:
    model, (x, y) = Small(), data(6)
    NGD(model, lr=0.0, alpha=1e-3)
    accumulate(model, (x, y), [4, 2])
    halves = zip(x.split([4, 2]), y.split([4, 2]), strict=True)
    parts = [matrix(rows(model, a, cross_entropies(b)), "conv") for a, b in halves]
    expected = sum(u.shape[1] / 6 * dense(u, u.mean(1), lam=1e-3 * (u.T @ u).norm()) for u in parts)
    close(vector(grads_of(model), "conv"), expected)


def test_a_pass_that_is_not_finite_is_not_stored() -> None:
    model, (x, y) = Small(), data(4)
    opt = FNGD(model, lr=0.0, alpha=1e-3, steps_per_epoch=1, accumulate="joint")
    broken = x.clone()
    broken[3, 0, 0, 0] = math.nan
    accumulate(model, (broken, y), [2, 2])
    opt.zero_grad()
    u = matrix(rows(model, x, cross_entropies(y)), "inner")
    for _ in range(2):
        accumulate(model, (x, y), [2, 2])
        close(vector(grads_of(model), "inner"), dense(u, u.mean(1), lam=1e-3 * (u.T @ u).norm()))
        opt.step()
        opt.zero_grad()


def test_misuse_of_joint_accumulation() -> None:
    model, (x, y) = Small(), data(6)
    opt = FNGD(model, lr=0.0, steps_per_epoch=1, accumulate="joint")
    accumulate(model, (x, y), [3, 3])
    opt.step()
    opt.zero_grad()
    accumulate(model, (x, y), [3, 3])
    with pytest.raises(ValueError, match="some backward passes of this step have stored coefficients"):
        accumulate(model, (x, y), [6])  # a third pass
    opt.remove()

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            return sum(self.inner(x) for _ in range(times))

    free = Free()
    opt = NGD(free, lr=0.0, accumulate="joint")
    free(torch.randn(4, 5, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"shape \[4, 5, 3\] and \[4, 6, 3\] in two backward passes"):
        free(torch.randn(4, 6, 3)).sum().backward()
    opt.zero_grad()
    free(torch.randn(4, 3)).sum().backward()
    with pytest.raises(ValueError, match="'inner' was used more often in this backward pass than in an earlier one"):
        free(torch.randn(4, 3), 2).sum().backward()
    opt.zero_grad()
    free(torch.randn(4, 3), 2).sum().backward()
    with pytest.raises(ValueError, match="'inner' was used less often"):
        free(torch.randn(4, 3)).sum().backward()
    opt.zero_grad()
    buffer = torch.randn(4, 3)
    free(buffer).sum().backward()
    buffer.normal_()
    with pytest.raises(ValueError, match="changed in place before the step"):
        free(buffer).sum().backward()


@pytest.mark.parametrize("kind", [NGD, FNGD])
def test_adamw_for_the_rest(kind: Any) -> None:
    """Layers step as by SGD (heavy damping), the normalisation as by torch's AdamW; schedulers see both groups."""
    model = Small()
    plain = copy.deepcopy(model)
    more = {"steps_per_epoch": 1} if kind is FNGD else {}
    opt = kind(model, lr=0.1, alpha=math.inf, other="adamw", other_options={"lr": 0.01, "weight_decay": 0.1}, **more)
    layers = [p for name, p in plain.named_parameters() if name.split(".")[0] in LAYERS]
    reference = [
        torch.optim.SGD(layers, lr=0.1, momentum=0.9),
        torch.optim.AdamW(plain.norm.parameters(), lr=0.01, weight_decay=0.1),
    ]
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.01]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (opt, *reference)]
    for _ in range(4):
        x, y = data(5)
        for net, steppers in ((model, [opt]), (plain, reference)):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for stepper in steppers:
                stepper.step()
        for schedule in schedules:
            schedule.step()
        saved = opt.state_dict()
        opt.load_state_dict(saved)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-12)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "rule": "adamw"})
    assert opt.param_groups[-1]["betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="rule='x' is unknown"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "rule": "x"})
    with pytest.raises(ValueError, match=r"other_options has \['x'\]; AdamW takes"):
        NGD(Small(), other="adamw", other_options={"x": 1})
