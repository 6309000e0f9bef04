"""Steps that are measured: what the quadratic model predicted, what the loss did, and the damping that follows.

The rule and the model are in `fngd.natural.adaptive_damping`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fngd.natural.adaptive_damping import AdaptiveDamping
from fngd.natural.policy import Policy
from fngd.natural.solve.directions import Pair
from fngd.natural.solve.method import Method
from fngd.optim.distributed import mean_over_processes
from fngd.optim.guards import CheckedLoss
from fngd.optim.layers import Members, Part, by_parameter, covered, members
from fngd.optim.state.parts import not_compiled
from persample.reweighting import Reweighting


class Measuring(CheckedLoss):
    """Part of `NGD` and `FNGD`: `adapt`, `measuring` and `damping_factor`."""

    _model: nn.Module
    _policy: Policy
    _handle: Reweighting
    _group: Any
    _method: Method
    _adaptive: AdaptiveDamping | None
    _predicted: Tensor | None = None  # M(δ) − M(0) of the last step, until adapt()
    param_groups: list[dict[str, Any]]

    @property
    def damping_factor(self) -> float:
        """What `alpha` or `damping` is multiplied with: 1 but for adaptive damping.

        >>> fngd.NGD(nn.Linear(3, 1), lr=0.1).damping_factor
        1.0
        """
        return self._policy.damping_factor

    @property
    def measuring(self) -> bool:
        """Whether the step just made was one that `adapt` is to be called for.

        >>> model, x = nn.Linear(3, 1), torch.randn(8, 3)
        >>> opt = fngd.NGD(model, lr=0.1, adapt_damping=AdaptiveDamping(every=1))
        >>> before = model(x).square().mean()
        >>> before.backward()
        >>> opt.step()
        >>> opt.measuring
        True
        """
        return self._predicted is not None

    @not_compiled
    def adapt(self, before: float | Tensor, after: float | Tensor) -> float:
        """Changes the damping by how well the last step was predicted; returns the ratio ρ, see
        `fngd.natural.adaptive_damping`.

        Arguments:
            before, after: the training loss of the batch that made the step, before and after it, reduced as ever
                (unscaled). The model should be in the same mode both times, and without dropout.

        To be called where `measuring` is true. With several processes each gives its own losses. It waits for the
        device. A predicted change that is no decrease (momentum can make one) says nothing: the damping stays.

        Raises ValueError if there is nothing to compare with.

        >>> model, x = nn.Linear(3, 1), torch.randn(8, 3)
        >>> opt = fngd.NGD(model, lr=0.1, adapt_damping=AdaptiveDamping(every=1))
        >>> before = model(x).square().mean()
        >>> before.backward()
        >>> opt.step()
        >>> ratio = opt.adapt(before, model(x).square().mean())
        >>> opt.damping_factor in (0.95, 1.0, 1 / 0.95)
        True
        """
        if self._predicted is None or self._adaptive is None:
            raise ValueError(
                "there is no prediction to compare with: construct the optimiser with adapt_damping=AdaptiveDamping(), "
                "and call adapt after those steps for which opt.measuring is true"
            )
        self._check_where_it_matters(before)
        first, second = (float(loss.detach() if isinstance(loss, Tensor) else loss) for loss in (before, after))
        changes = torch.stack([self._predicted.new_tensor(second - first), self._predicted])
        actual, predicted = mean_over_processes(changes, self._group).tolist()
        self._predicted = None
        ratio = actual / predicted if predicted else float("nan")
        if not predicted >= 0:  # NaN counts as a bad prediction
            self._policy.damping_factor = self._adaptive.updated(self._policy.damping_factor, ratio)
        return ratio

    def _check_where_it_matters(self, loss: Any) -> None:
        if isinstance(loss, Tensor) and (self._method.needs_scale or self._adaptive is not None):
            self.check_loss(loss)

    def _check_adapted(self) -> None:
        if self._predicted is not None:
            raise ValueError(
                "the damping is to adapt, but adapt() was not called after the step that was measured. After each "
                "step: if opt.measuring: opt.adapt(loss, the same loss computed again)"
            )

    def _elsewhere(self, layers: Iterable[str]) -> list[Members]:
        raise NotImplementedError(f"{type(self).__name__} defines _elsewhere")

    def _before(self) -> tuple[dict[Tensor, Tensor], list[Members]]:
        """Copies of the parameters, where this step's change of the loss is to be predicted.

        With them the layers of which other processes alone have a model: they have run them, and this one has not.
        """
        own = [path for model in self._policy.models.values() for path in model.plain]
        elsewhere = self._elsewhere(own) if self._policy.measuring else []
        if not own and not elsewhere:
            return {}, []
        moving = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if any(hasattr(param, "to_local") for param in moving):
            raise ValueError("adapt_damping needs whole parameters, but these are sharded (FSDP); leave it out")
        return {param: param.detach().clone() for param in moving}, elsewhere

    def _predict(self, before: dict[Tensor, Tensor], elsewhere: list[Members]) -> Tensor:
        """M(δ) − M(0) of the step that led away from `before`; the loss does not depend on layers `elsewhere`."""
        tables = {id(each.weight) for each in self._model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)}
        change = torch.zeros((), dtype=torch.float64, device=next(iter(before)).device)
        places = {path: members(self._handle, path) for model in self._policy.models.values() for path in model.plain}
        inside = by_parameter([*places.values(), *elsewhere])
        for model in self._policy.models.values():
            delta: dict[str, Pair] = {}
            for path, plain in model.plain.items():
                own = places[path]
                if own[0] is not None and id(own[0].param) in tables:
                    raise ValueError(
                        f"adapt_damping cannot predict the step of '{path}': its weight is an embedding's, too, and "
                        "the gradients of the two uses cannot be told apart in .grad. Give it a group with "
                        "precondition=False, or leave adapt_damping out"
                    )
                weight, bias = (
                    None if gradient is None or part is None else _moved(part, before)
                    for part, gradient in zip(own, plain, strict=True)
                )
                delta[path] = weight, bias
            change += model.change(delta).to(change.device)
        for param, old in before.items():
            if param.grad is None or any(part.whole for part in inside.get(param, ())):
                continue
            products = param.grad.double() * (param - old)
            if param in inside:  # rows that no layer has
                products = products * ~covered(inside[param])
            change += products.sum().to(change.device)
        return change


def _moved(part: Part, before: dict[Tensor, Tensor]) -> Tensor:
    param = part.of(part.param)
    return param - part.of(before[part.param]) if part.param in before else torch.zeros_like(param)
