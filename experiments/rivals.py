"""What Gauss–Newton is raced with on differential equations: Adam, SOAP, L-BFGS and a self-scaled Broyden method.

All minimise `Problem.loss()`. A rival makes a step when it is called, and is told by `redrawn` that the points are
others, so that nothing it remembers mixes two losses.

    symbol   meaning, in the self-scaled Broyden family                          shape
    H        approximation of the loss's inverse Hessian                         [P, P]
    s, y     step, and change of the gradient                                    [P]
    α        step size, s = −αHg                                                 number
    a, b, h  b = sᵀH⁻¹s/yᵀs, h = yᵀHy/yᵀs, a = bh − 1                            numbers
    θ, φ, τ  which member of the family, and its scale                           numbers
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lbfgs import _strong_wolfe

from fngd.demo.poisson import Problem
from fngd.demo.race import adam, lbfgs

Rate = Callable[[], float]


class Rival:
    """Steps made by a function that `begin` returns, from the start and again where points were drawn anew."""

    def __init__(self, begin: Callable[[], Callable[[], None]], *, forgets: bool = False) -> None:
        self._begin, self._forgets = begin, forgets
        self._move = begin()

    def __call__(self) -> None:
        self._move()

    def redrawn(self) -> None:
        """The loss is of other points from now on."""
        if self._forgets:
            self._move = self._begin()


class SelfScaledBroyden:
    """Quasi-Newton with the whole of H, self-scaled, and a strong Wolfe search; the "SSBroyden2" of its authors.

        H ← (H − Hy yᵀH/yᵀHy + φ·v vᵀ)/τ + s sᵀ/yᵀs,    v = √(yᵀHy)·(s/yᵀs − Hy/yᵀHy)

    Source: Urbán, Stefanou, Pons, "Unveiling the optimization process of physics informed neural networks" (2025),
    equations 13 to 23, after Al-Baali and Khalfan.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._params = problem, list(problem.net.parameters())
        self._x = nn.utils.parameters_to_vector(self._params).detach()
        self._inverse: Tensor | None = None
        self._size = 1.0
        self._at: tuple[float, Tensor] | None = None

    def redrawn(self) -> None:
        """Loss and gradient are of other points; H is kept."""
        self._at = None

    def __call__(self) -> None:
        """One iteration."""
        f, g = self._at or self._look(self._x)
        d = -g if self._inverse is None else -(self._inverse @ g)
        slope = (g @ d).item()
        if not slope < 0:
            self._inverse, d = None, -g
            slope = (g @ d).item()
            if not slope < 0:
                return
        first = min(1.0, 1.0 / g.abs().sum().item()) if self._inverse is None else 1.0
        f, new, t, _ = _strong_wolfe(
            lambda x, t, d: self._look(x + t * d), self._x, first, d, f, g, slope, c1=1e-4, c2=0.9, max_ls=25
        )
        t = float(t)
        step, change = t * d, new - g
        self._x = self._x + step
        self._at = (float(f), new)
        self._put(self._x)
        if (step @ change).item() > 0:
            self._inverse = updated(self._inverse, step, change, t, g)
        else:
            self._inverse = None

    def _look(self, x: Tensor) -> tuple[float, Tensor]:
        self._put(x)
        with torch.enable_grad():
            loss = self._problem.loss()
            grads = torch.autograd.grad(loss, self._params)
        return loss.item(), torch.cat([grad.reshape(-1) for grad in grads])

    def _put(self, x: Tensor) -> None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(x, self._params)


def updated(inverse: Tensor | None, s: Tensor, y: Tensor, step: float, g: Tensor) -> Tensor:
    """H after a step of this size from a point with gradient g; None stands for the identity, scaled by the first step.

    >>> s, y, g = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.5], [2.0, 0.4], [-1.0, -0.5]))
    >>> updated(torch.eye(2, dtype=torch.float64), s, y, 1.0, g) @ y  # the secant equation
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    first = inverse is None
    H = torch.eye(len(s), dtype=s.dtype) if inverse is None else inverse
    ys, Hy = (y @ s).item(), H @ y
    yHy = (y @ Hy).item()
    b, h = -step * (s @ g).item() / ys, yHy / ys
    a = max(b * h - 1, 0.0)
    c = math.sqrt(a / (1 + a))
    lowest = min(1.0, h * (1 - c))
    least, most = ((lowest - 1) / a if a > 1e-12 else 0.0), 1 / lowest
    theta = max(least, min(most, (1 - b) / b))
    sigma = max(1 + theta * a, 1e-12)
    phi = (1 - theta) / sigma
    if first:
        tau = h / sigma
    else:
        shrink, power = min(1.0, 1 / b), sigma ** (-1 / (len(s) - 1))
        tau = shrink * min(power, 1 / theta) if theta > 0 else min(shrink * power, sigma)
    v = math.sqrt(yHy) * (s / ys - Hy / yHy)
    H = (H - torch.outer(Hy, Hy / yHy)).addr_(v, phi * v).div_(tau)
    return H.addr_(s, s / ys)


class Soap(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's two matrices, whose rotation is renewed every few steps.

    Source: Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam" (2024), without its options.
    """

    def __init__(
        self, params: list[Tensor], lr: float, betas: tuple[float, float] = (0.95, 0.95), every: int = 10
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._betas, self._every, self._count = betas, every, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the gradients that there are."""
        first, second = self._betas
        self._count += 1
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad.view(len(p), -1) if p.dim() > 1 else p.grad.view(1, -1)
                state = self.state[p]
                if not state:
                    sizes = grad.shape
                    state["sides"] = [grad.new_zeros(n, n) for n in sizes]
                    state["bases"] = None
                    state["mean"], state["square"] = torch.zeros_like(grad), torch.zeros_like(grad)
                for side, product in zip(state["sides"], (grad @ grad.T, grad.T @ grad), strict=True):
                    side.lerp_(product, 1 - second)
                if state["bases"] is None:
                    state["bases"] = [torch.linalg.eigh(side)[1] for side in state["sides"]]
                elif self._count % self._every == 0:
                    state["bases"] = [
                        torch.linalg.qr(side @ base)[0]
                        for side, base in zip(state["sides"], state["bases"], strict=True)
                    ]
                left, right = state["bases"]
                state["mean"].lerp_(grad, 1 - first)
                state["square"].lerp_((left.T @ grad @ right).square(), 1 - second)
                mean = left.T @ state["mean"] @ right / (1 - first**self._count)
                scaled = mean / ((state["square"] / (1 - second**self._count)).sqrt() + 1e-12)
                p.sub_((left @ scaled @ right.T).view_as(p), alpha=group["lr"])


def soap(problem: Problem, rate: Rate) -> Callable[[], None]:
    """A step of SOAP at the rate of the moment."""
    opt = Soap(list(problem.net.parameters()), 0.0)

    def move() -> None:
        opt.param_groups[0]["lr"] = rate()
        opt.zero_grad()
        problem.loss().backward()
        opt.step()

    return move


def rival(kind: str, problem: Problem, rate: Rate) -> Rival | SelfScaledBroyden:
    """A rival by its name."""
    if kind == "ssbroyden":
        return SelfScaledBroyden(problem)
    if kind == "lbfgs":
        return Rival(lambda: lbfgs(problem), forgets=True)
    return Rival(lambda: {"adam": adam, "soap": soap}[kind](problem, rate))
