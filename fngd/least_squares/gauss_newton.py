"""Gauss–Newton for least squares and physics-informed networks: a closure of residuals, one linear solve, one search.

    closure ─▶ residuals ─▶ Jacobian ─▶ K = J Jᵀ or JᵀJ ─▶ damping, solve ─▶ direction ─▶ line search ─▶ the step
  repeated.py  residuals.py  jacobian.py        systems.py, sample_solve.py, damping.py    attempt.py, acceleration.py,
               ╰──────────────── linear_model.py ─────────────────╯                        line_search.py

    symbol   meaning                                                                      shape
    s        scaled residuals, L = ½‖s‖² (residuals)                                      [B]
    J        ∂s/∂θ                                                                        [B, P]
    λ, μ     damping, momentum
    φ        the step taken last, before the learning rate                                [P]
    d        the direction; θ ← θ − lr·t·d, and a term of t² (acceleration)               [P]

    d = μφ + Jᵀ(J Jᵀ + λI)⁻¹(s − μJφ)

is the minimiser of ‖J d − s‖² + λ‖d − μφ‖²: the damped Gauss–Newton step for μ = 0 (Levenberg 1944, Marquardt 1963; in
sample space it is MinSR, Chen and Heyl 2023, and ENGD-W, Guzmán-Cordero et al. 2025), and SPRING for μ > 0
(Goldshlager, Abrahamsen, Lin 2024).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from fngd.least_squares.attempt import Attempt
from fngd.least_squares.damping import ADAPTIVE, Adaptive, Damping, damping_of
from fngd.least_squares.jacobian import flatten
from fngd.least_squares.line_search import FACTOR, Found, Ray
from fngd.least_squares.linear_model import CHECK_EVERY, FormOptions, LinearModel
from fngd.least_squares.progress import Progress, StepInfo, advice
from fngd.least_squares.repeated import DRAWS, RepeatedClosure, graph_kept, same
from fngd.least_squares.residuals import check_weights
from fngd.least_squares.reweighing import Reweigh, Reweighing, State
from fngd.least_squares.systems import SketchOptions
from fngd.optim.checks import RATE, Checked, Kind, check_options
from fngd.optim.state.forms import COUNT, NUMBER, Maybe, Table, Where, check_form
from fngd.optim.state.parts import TORCH, check_shapes, whole_or_not

RETRIES = 4
"""Larger dampings tried, each RAISE times the one before, where no step size lowers the loss."""
RAISE = 10.0


ABOVE_ZERO = Where(NUMBER, lambda value: 0 < value < math.inf, "a number > 0")
START = Where(NUMBER, lambda value: 0 < value <= 1, "a number > 0, at most 1")
FORM = {
    "gauss_newton": {"steps": COUNT, "start": START, "damping": Maybe(ABOVE_ZERO), "reweigh?": [Table(str, Tensor)]}
}
"""Of what a state has besides torch's part."""


class GaussNewton(Checked, Optimizer):
    """Damped Gauss–Newton with SPRING momentum and a line search; a `torch.optim.Optimizer` for residuals.

    `opt.step(closure)` minimises L = ½ Σ_g w_g·mean_b r_gb² over the residual groups g that the closure returns: one
    tensor [B], a dict name -> [B_g], or a tuple of tensors. The residuals may contain derivatives of the network
    with respect to its inputs, by `torch.autograd.grad(..., create_graph=True)` or `torch.func`. The closure neither
    zeroes nor computes gradients, and calls the model itself, for it is called again at the parameters that a step
    tries. Points that it draws by `torch.rand`, `numpy.random.rand` or `random`, and dropout masks, are the same in all
    calls of a step and new in the next; those of a generator object are to be drawn between steps.

    Arguments:
        params: a model, parameters, or parameter groups.
        lr: the largest step, > 0; the direction is multiplied by it and then by the search's t ≤ 1. One is the
            Gauss–Newton step. A parameter group's own lr holds for its part.
        damping: "adaptive" for Levenberg–Marquardt, or `fngd.least_squares.damping.Adaptive(...)` with its options; a
            number λ ≥ 0 on J Jᵀ of the *scaled* residuals; or a function step -> λ. "adaptive" needs no tuning and does
            not depend on units. A fixed λ that suits can be ahead for some steps, one that does not is stuck on some
            seeds. For noisy data, where the least loss is not what is wanted, 1e-3 and more.
        momentum: μ in [0, 1).
        line_search: choose t among 1, ½, ¼, … by the loss (two or three closure calls a step, started where the
            last step ended); False takes t = 1.
        acceleration: bend the line that is searched by geodesic acceleration (`fngd.least_squares.acceleration`); one
            more closure call and solve a step. Without a line search there is none.
        weights: w_g ≥ 0 by name of the group; 1 for those not named.
        reweigh: weights of single residuals that follow them from step to step: `ResidualAttention`, `GroupBalance`,
            `CausalWeights` of `fngd.least_squares`, a function of one's own (`fngd.least_squares.reweighing`), or
            several. The loss that a step returns has them in it.
        gram: "rows" forms J [B, P]; "factored" forms K from per-sample factors, parameter by parameter, for wide
            layers; "auto" is "rows" up to 512 MiB of J, after which rows are formed in chunks.
        chunk_size: rows of J held at once. Peak memory beside the graph is then three chunks of J and the matrix;
            the time grows with the number n of chunks as n(n + 1)/2 for K, n for JᵀJ. None: all.
        solve: "samples" (B × B), "parameters" (P × P), "sketch" (neither), or "auto": the smaller matrix, and
            the sketch where both B and P exceed `max_samples`.
        max_samples: largest matrix that is formed.
        sketch: `SketchOptions`, rank, tolerance and iterations of the solve that forms neither matrix: gradients of
            random sums of points precondition conjugate gradients. Its error is `opt.info.error`; beside the closure's
            graph it takes at most 512 MiB.
        check: verify rows against the gradient of their sum, and that the closure repeats, in one of 16 steps.

    Raises:
        ValueError: an option out of range; in `step`, residuals of a wrong shape, NaN at the current parameters, or
            residuals that do not follow the parameters.

    Warns, once each, where residuals differ between two calls at one point (looked for in one of 16 steps, with
    `check`), and where steps bring nothing though the linear model foretells much.

    J is held and linear systems are solved in float64 whatever the parameters' precision, so float32 is as good until
    the rounding of the residuals themselves shows, and λ goes down to ε²·tr(K). With J in chunks, factored or
    sketched, products with it are of the parameters' precision: λ ≥ ε·tr(K). A step waits for the device several times.

    >>> model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64).unsqueeze(1)
    >>> opt = GaussNewton(model, damping=1e-6)
    >>> for _ in range(20):
    ...     loss = opt.step(lambda: (model(x) - x.sin()).squeeze(1))
    >>> bool(loss < 1e-6)
    True
    """

    _kinds = MappingProxyType({"lr": RATE, "damping": Kind("checked by damping_of")})
    _models_as_params = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float = 1.0,
        damping: Damping = ADAPTIVE,
        momentum: float = 0.0,
        line_search: bool = True,
        acceleration: bool = True,
        weights: Mapping[str, float] | None = None,
        reweigh: Reweigh | Sequence[Reweigh] | None = None,
        gram: str = "auto",
        chunk_size: int | None = None,
        solve: str = "auto",
        max_samples: int = 8192,
        sketch: SketchOptions | None = None,
        check: bool = True,
    ) -> None:
        form = FormOptions(gram, chunk_size, solve, max_samples, sketch or SketchOptions(), check)
        check_weights(weights)
        self.damping = damping_of(damping)
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, {"lr": lr})
        self.momentum, self.line_search, self.weights = momentum, line_search, dict(weights or {})
        self.acceleration = acceleration
        self.form = form
        self._reweigh = Reweighing(reweigh)
        self._weight_states: Sequence[State] = ()
        self.info: StepInfo | None = None
        self._steps, self._start = 0, 1.0
        self._adapted: float | None = None
        self._progress, self._differed = Progress(), False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as any optimiser does. Raises ValueError for lr ≤ 0 or parameters that are not real."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_options({"lr": group["lr"]}, self._kinds)
        kinds = {(p.dtype, p.device) for each in self.param_groups for p in each["params"]}
        if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
            raise ValueError(
                f"parameters are {sorted(map(str, kinds))}; Gauss–Newton needs one real floating-point dtype and one "
                "device for all"
            )

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def direction(self, closure: Callable[[], Any]) -> tuple[Tensor, ...]:
        """Returns d for each parameter that requires a gradient, and changes nothing.

        >>> w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        >>> GaussNewton([w]).direction(lambda: (2 * w).sum().view(1))  # a linear residual: all the way to its zero
        (tensor([3.0000], dtype=torch.float64),)
        """
        with graph_kept():
            model = self._model(self._calls(closure))
            solved = model.solve(self._damping(model), self._previous())
        return tuple(part.clone() for part in self._split(solved.direction))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step and returns the loss before it, a scalar tensor; `info` tells the rest.

        Where no step size lowers the loss, momentum is dropped and up to four dampings, each ten times the last,
        are tried; if none helps the parameters stay and `info.accepted` is False.
        """
        if closure is None:
            raise ValueError("GaussNewton needs residuals: call opt.step(closure) with a closure that returns them")
        with graph_kept():
            return self._step(self._calls(closure))

    def _step(self, calls: RepeatedClosure) -> Tensor:
        model = self._model(calls)
        damping, previous = self._damping(model), self._previous()
        params, rates = self._params, self._rates()
        origin = [p.clone() for p in params]
        retries = 0
        while True:
            solved = model.solve(damping, previous)
            parts = self._split(solved.direction)
            ray = Ray(params, [part * rate for part, rate in zip(parts, rates, strict=True)], origin)
            attempt = Attempt(calls, model, ray, damping) if self._looks_ahead else None
            found = self._search(attempt, rates) if attempt else self._unseen(model, ray)
            if found.step or retries == RETRIES or (attempt and attempt.hidden):
                break
            retries, previous = retries + 1, None
            damping = RAISE * max(damping, torch.finfo(torch.float64).eps)
        ray.settle(found.step)
        gain = self._remember(attempt, ray, found, damping, calls.states)
        if attempt:
            tries = advice(isinstance(self.damping, Adaptive), params[0].dtype)
            self._progress.note(model.loss, found.loss, attempt.predicted, attempt.hidden, tries)
        self.info = StepInfo(
            model.loss, found.loss if attempt else None, found.step, damping, gain, solved.method,
            solved.error, solved.iterations, calls.repeats, retries, found.step > 0,
        )  # fmt: skip
        return params[0].new_tensor(model.loss)

    def _calls(self, closure: Callable[[], Any]) -> RepeatedClosure:
        return RepeatedClosure(closure, self.weights, self._params[0].device, self._reweigh, self._weight_states)

    def _model(self, calls: RepeatedClosure) -> LinearModel:
        residuals = calls.first()
        model = LinearModel(residuals, self._params, calls.again, self.form, step=self._steps)
        if self._looks_ahead and self.form.check and self._steps % CHECK_EVERY == 0 and not self._differed:
            found = same(residuals, calls.again())
            if found is not None:
                self._differed = True
                warnings.warn(
                    f"residuals differ between two calls of the closure at the same parameters ({found}), so steps are "
                    f"accepted and rejected by chance. {DRAWS}; or use line_search=False with a fixed damping, where "
                    "the closure is called once a step",
                    stacklevel=5,
                )
        return model

    def _previous(self) -> Tensor | None:
        """μφ; None where there is none."""
        params = self._params
        steps = [self.state[p].get("momentum_buffer") for p in params]
        if not self.momentum or all(step is None for step in steps):
            return None
        return self.momentum * flatten(steps, params)

    @property
    def _looks_ahead(self) -> bool:
        return self.line_search or isinstance(self.damping, Adaptive)

    def _search(self, attempt: Attempt, rates: list[float]) -> Found:
        if not self.line_search:
            return attempt.full()
        if self.acceleration:
            attempt.accelerate(self._start, rates)
        return attempt.search(min(1.0, self._start / FACTOR))

    def _unseen(self, model: LinearModel, ray: Ray) -> Found:
        """The full step, without a look at the loss there."""
        return Found(float(all(bool(part.isfinite().all()) for part in ray.change)), model.loss, 0)

    def _remember(
        self, attempt: Attempt | None, ray: Ray, found: Found, damping: float, states: Sequence[State]
    ) -> float | None:
        """Keeps what the next step needs; returns the gain ratio, where damping is adaptive."""
        self._steps += 1
        self._weight_states = states
        self._start = found.step or 1.0
        if self.momentum:
            for param, moved, rate in zip(ray.params, ray.moved(found.step), self._rates(), strict=True):
                self.state[param]["momentum_buffer"] = moved / rate
        if not isinstance(self.damping, Adaptive) or attempt is None:
            return None
        gain = attempt.gain(found)
        left = found.loss / loss if (loss := attempt.loss) else 0.0
        seen = (1.0, 1.0) if attempt.hidden else (gain, found.step, left)  # a ratio of rounding errors tells nothing
        self._adapted = self.damping.next(damping, *seen)
        return gain

    def _damping(self, model: LinearModel) -> float:
        if isinstance(self.damping, Adaptive):
            return self.damping.within(self._adapted, model.trace)
        value = float(self.damping(self._steps) if callable(self.damping) else self.damping)
        if not 0 <= value < math.inf:
            raise ValueError(f"damping gave {value} in step {self._steps}; it must be ≥ 0 and finite")
        return value

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _split(self, flat: Tensor) -> list[Tensor]:
        params = self._params
        parts = flat.split([p.numel() for p in params])
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, params, strict=True)]

    def forget_weights(self) -> None:
        """Lets `reweigh` begin again, as it has to where points were drawn anew whose residuals it remembers.

        >>> from fngd.least_squares import ResidualAttention
        >>> opt = GaussNewton(nn.Linear(1, 1), reweigh=ResidualAttention())
        >>> opt.forget_weights()
        """
        self._weight_states = ()

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state (momentum by parameter) and, under "gauss_newton", the scalars."""
        return {**super().state_dict(), "gauss_newton": self._scalars()}

    def _scalars(self) -> dict[str, Any]:
        own = {"reweigh": [dict(state) for state in self._weight_states]} if self._reweigh.parts else {}
        return {"steps": self._steps, "start": self._start, "damping": self._adapted, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for the state of another kind of optimiser."""
        check_form(state_dict, {}, "")
        if "gauss_newton" not in state_dict:
            raise ValueError("the state has no 'gauss_newton': it was not saved by GaussNewton")
        check_form(state_dict, {**TORCH, **FORM}, "")
        check_shapes(state_dict, self.param_groups)
        for group in state_dict["param_groups"]:
            check_form(group, {"lr": ABOVE_ZERO}, "parameter group")
        with whole_or_not(self, self._scalars, self._take):
            super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
            self._take(state_dict["gauss_newton"])

    def _take(self, scalars: Mapping[str, Any]) -> None:
        self._steps, self._start, self._adapted = scalars["steps"], scalars["start"], scalars["damping"]
        self._weight_states = scalars.get("reweigh", ())
