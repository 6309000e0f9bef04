"""EK-FAC influence: the scores of explicit matrices, and what training without some samples really does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fngd

pytestmark = pytest.mark.usefixtures("double")


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3, bias=False)
    )


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 3, 3, generator=generator), torch.randint(3, (count,), generator=generator)


def matrices(model: nn.Sequential, losses: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """Per-sample gradients of each covered layer and group, [groups, samples, out, inp], a sample at a time."""
    conv, linear = model[0], model[4]
    found: list[list[Tensor]] = [[], []]
    for b in range(len(x)):
        loss = losses(model(x[b : b + 1]), y[b : b + 1]).sum()
        weight, bias, other = torch.autograd.grad(loss, [conv.weight, conv.bias, linear.weight])
        found[0].append(torch.cat([weight.reshape(2, 2, -1), bias.reshape(2, 2, 1)], 2))
        found[1].append(other.unsqueeze(0))
    return [torch.stack(each, 1) for each in found]


def kronecker(model: nn.Sequential, losses: Any, x: Tensor, y: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """(A, G) of each layer and group."""
    hidden = model[0](x)
    flat = model[3](model[2](model[1](hidden)))
    logits = model[4](flat)
    z = torch.autograd.grad(losses(logits, y).sum(), [hidden, logits])
    patches = F.unfold(x, 2).mT.reshape(len(x), 4, 2, 4).permute(2, 0, 1, 3).flatten(1, 2)  # [groups, N·T, inp]
    patches = torch.cat([patches, torch.ones(2, len(x) * 4, 1)], 2)
    rows = z[0].flatten(2).reshape(len(x), 2, 2, 4).permute(1, 0, 3, 2).flatten(1, 2)
    first = [(p.T @ p / len(x), r.T @ r / len(r)) for p, r in zip(patches, rows, strict=True)]
    return [first, [(flat.detach().T @ flat.detach() / len(x), z[1].T @ z[1] / len(x))]]


@pytest.mark.parametrize("damping", [{"damping": 0.3}, {"alpha": 0.2}])
@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_scores_are_those_of_explicit_matrices(fisher: str, damping: dict[str, float]) -> None:
    model, (x, y), (queries, answers) = net(), data(11, 1), data(3, 2)

    def drawn(outputs: Tensor) -> Tensor:  # labels that follow from the outputs alone
        return F.cross_entropy(outputs, outputs.detach().argmin(1), reduction="none")

    def curvature(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) if fisher == "empirical" else drawn(outputs)

    expected = torch.zeros(3, 11)
    own, asked = (matrices(model, cross_entropy, *each) for each in ((x, y), (queries, answers)))
    curved = matrices(model, curvature, x, y)
    for layer, factors in enumerate(kronecker(model, curvature, x, y)):
        bases = [torch.kron(torch.linalg.eigh(g)[1], torch.linalg.eigh(a)[1]) for a, g in factors]
        scales = [(rows.flatten(1) @ q).square().mean(0) for rows, q in zip(curved[layer], bases, strict=True)]
        lam = damping.get("damping", damping.get("alpha", 0.0) * torch.stack(scales).mean())
        for group, (q, scale) in enumerate(zip(bases, scales, strict=True)):
            fisher_matrix = q @ torch.diag(scale) @ q.T + lam * torch.eye(len(q))
            rows = own[layer][group].flatten(1)
            expected += asked[layer][group].flatten(1) @ torch.linalg.solve(fisher_matrix, rows.T)
    before = [p.detach().clone() for p in model.parameters()]
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    got = fngd.influence(
        batches, [(queries[:2], answers[:2]), (queries[2:], answers[2:])], model=model, loss=cross_entropy,
        fisher=fisher, likelihood=drawn, **damping,
    )  # fmt: skip
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= 1e-8, f"relative deviation {error:.1e}"
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    fngd.KFAC(model)  # the hooks are gone


def test_drawn_labels_repeat_with_their_seed() -> None:
    model, batch = net(), data(8, 3)
    scores = [fngd.influence([batch], [batch], model=model, loss=cross_entropy, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert torch.allclose(scores[0], scores[0].T), "training samples as queries: a symmetric matrix"


def trained(model: nn.Module, x: Tensor, y: Tensor, weights: Tensor) -> nn.Module:
    """The minimum of the weighted mean loss with weight decay, from these parameters."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        loss = (cross_entropy(model(x), y) * weights).mean() + 0.01 * decay
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def ranks_agree(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation."""
    return torch.corrcoef(torch.stack([each.argsort().argsort().double() for each in (first, second)]))[0, 1].item()


def test_scores_foretell_training_without_some_samples() -> None:
    """Linear datamodelling score: losses of queries after training on random halves, against sums of scores."""
    torch.manual_seed(0)
    centres = torch.randn(3, 6)
    y = torch.randint(3, (60,))
    x = centres[y] + 1.5 * torch.randn(60, 6)
    y = torch.where(torch.rand(60) < 0.15, torch.randint(3, (60,)), y)  # wrong labels, whose influence is bad
    targets = torch.randint(3, (8,))
    queries = centres[targets] + 1.5 * torch.randn(8, 6)
    start = nn.Linear(6, 3)
    model = trained(start, x, y, torch.ones(60))
    # With weight decay .01·‖θ‖² the Hessian matrix is that of the losses + .02 I.
    scores = fngd.influence([(x, y)], [(queries, targets)], model=model, loss=cross_entropy, damping=0.02)
    dots = fngd.influence([(x, y)], [(queries, targets)], model=model, loss=cross_entropy, damping=1e9)
    halves = torch.stack([(torch.rand(60) < 0.5).double() for _ in range(40)])
    losses = torch.stack([
        cross_entropy(trained(start, x, y, 2 * half)(queries), targets).detach() for half in halves
    ])  # fmt: skip
    agreement, plain = (
        torch.tensor([ranks_agree(halves @ each[q], -losses[:, q]) for q in range(8)]).mean().item()
        for each in (scores, dots)
    )
    assert agreement > 0.75, f"EK-FAC {agreement:.2f}, gradient products {plain:.2f}"
    assert agreement > plain, f"EK-FAC {agreement:.2f}, gradient products {plain:.2f}"


def test_mistakes_are_told() -> None:
    model, batch = net(), data(4, 0)
    options: Any = {"model": model, "loss": cross_entropy}
    with pytest.raises(ValueError, match=r"fisher='exact' is unknown; choose one of \['true', 'empirical'\]"):
        fngd.influence([batch], [batch], fisher="exact", **options)
    with pytest.raises(ValueError, match=r"damping=0\.0; it must be a number > 0"):
        fngd.influence([batch], [batch], damping=0.0, **options)
    with pytest.raises(ValueError, match="train is an iterator"):
        fngd.influence(iter([batch]), [batch], **options)
    with pytest.raises(ValueError, match=r"one number for each sample, \[batch\]"):
        fngd.influence([batch], [batch], model=model, loss=F.cross_entropy, fisher="empirical")
    with pytest.raises(ValueError, match="nothing is covered"):
        fngd.influence([batch], [batch], model=nn.Sequential(nn.Flatten(), nn.LayerNorm(18)), loss=cross_entropy)
