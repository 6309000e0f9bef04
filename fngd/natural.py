"""What NGD and FNGD share: coefficients in the backward pass, then a step of SGD with momentum, or AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.optimizer import Optimizer

from fngd.adaptive import AdaptiveDamping
from fngd.directions import Pair
from fngd.distributed import mean_over_processes, world_size
from fngd.first_order import ADAMW, first_order_step
from fngd.groups import check_group, first_order_groups
from fngd.guards import Unchanged, reduction_of
from fngd.kl_clip import kl_clip_bound
from fngd.likelihoods import sampled_losses
from fngd.method import Method
from fngd.policy import Policy
from fngd.sharing import CoefficientTable
from persample import reweight

CHECK_EVERY = 100
"""Steps between two looks at whether the model is still the one that the optimiser was constructed with."""


class NaturalSGD(Optimizer):
    """Base of `NGD` and `FNGD`; `_table` holds shared coefficients, None computes them in every step."""

    _table: CoefficientTable | None = None

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        alpha: float | None = 1e-2,
        damping: float | None = None,
        adapt_damping: AdaptiveDamping | None = None,
        scale: str = "absorb",
        reduction: str = "mean",
        fisher: str = "empirical",
        gram: str = "layer",
        accumulate: str = "separate",
        kl_clip: float | None = None,
        other: str = "sgd",
        other_options: Mapping[str, Any] | None = None,
        output_axis: int = 0,
        scaler: Any = None,
        process_group: Any = None,
        diagnostics: bool = False,
        batch_axis: int | Mapping[str, int] | None = None,
        foreach: bool | None = None,
        seed: int = 0,
    ) -> None:
        method = Method(
            alpha=alpha, damping=damping, scale=scale, reduction=reduction, fisher=fisher, gram=gram,
            accumulate=accumulate, kl_clip=kl_clip, output_axis=output_axis,
        )  # fmt: skip
        if self._table is not None:
            method.check_sharing(self._table.refresh_cosine)
        if adapt_damping is not None and gram == "global":
            raise ValueError("adapt_damping does not go with gram='global'; use gram='layer' or 'network'")
        self._model, self._method, self._group, self._seed = model, method, process_group, seed
        self._scaler = scaler
        self._adaptive, self._completed = adapt_damping, 0
        self._predicted: Tensor | None = None  # M(δ) − M(0) of the last step, until adapt()
        self._random: torch.Generator | None = None
        self._policy = Policy(
            method,
            self._table,
            chosen=lambda layer: bool(self._option(layer, "precondition", True)),
            scaler=scaler,
            process_group=process_group,
            diagnostics=diagnostics,
        )
        self._policy.measuring = adapt_damping is not None
        joint = gram == "network"
        handle = self._policy.handle = self._handle = reweight(
            model,
            self._policy.of_all if joint else self._policy.of_layer,
            batch_axis=batch_axis,
            joint=joint,
            outputs=fisher == "improved",
        )
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "precondition": True, "rule": "sgd", "foreach": foreach,
        }  # fmt: skip
        try:
            chosen = {param for path in handle.explain() for param in self._parameters(path)}
            groups = first_order_groups(model.parameters() if params is None else params, chosen, other, other_options)
            super().__init__(groups, defaults)
        except BaseException:
            handle.remove()  # a constructor that fails leaves the model alone
            raise
        self._find_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as any optimiser does."""
        if param_group.get("rule") == "adamw":
            # Not among the defaults: OneCycleLR would take them to mean that there is no momentum.
            param_group = {"betas": ADAMW["betas"], "eps": ADAMW["eps"], **param_group}
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        if hasattr(self, "_group_of"):  # torch's constructor calls this, too
            self._find_groups()

    def _parameters(self, layer: str) -> list[Tensor]:
        return [param for param in self._model.get_submodule(layer)._parameters.values() if param is not None]

    def _find_groups(self) -> None:
        """Notes each layer's group by its number: loading a state makes new groups, and FSDP swaps parameters."""
        numbers = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        weights = {path: self._model.get_submodule(path)._parameters.get("weight") for path in self._handle.explain()}
        self._group_of = {path: numbers.get(id(weight)) for path, weight in weights.items()}
        self._unchanged = Unchanged(self._model)

    def _option(self, layer: str, name: str, default: Any) -> Any:
        number = self._group_of[layer]
        return default if number is None else self.param_groups[number].get(name, default)

    def sample(
        self, outputs: Tensor, likelihood: str | Callable[[Tensor], Tensor] = "categorical", *,
        class_axis: int | None = None,
    ) -> None:  # fmt: skip
        """Draws labels from the model and back-propagates them, for fisher="true"; `.grad` stays as it is.

        Arguments:
            outputs: what the model returned in this forward pass: logits, or means.
            likelihood: "categorical", "bernoulli", "gaussian" (variance 1), or a function that draws labels for the
                outputs and returns −log p of them, [B]; see `fngd.likelihoods`.
            class_axis: the axis of classes, where outputs have more than two.

        To be called between the forward pass and its `loss.backward()`. With "damping=" or "per_layer" the
        likelihood must be the one whose −log p is a sample's training loss; else its scale does not matter.

        Raises ValueError if the Fisher matrix is not the true one, the outputs have no graph, or for a likelihood
        that `fngd.likelihoods` refuses.

        >>> model = nn.Linear(3, 4)
        >>> opt = fngd.NGD(model, lr=0.1, fisher="true")
        >>> logits = model(torch.randn(8, 3))
        >>> opt.sample(logits)
        >>> nn.functional.cross_entropy(logits, torch.arange(8) % 4).backward()
        >>> opt.step()
        """
        if self._method.fisher != "true":
            raise ValueError(f"sample(outputs) is for fisher='true', but fisher is {self._method.fisher!r}")
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            found = "one without a graph" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"sample needs the tensor that the model returned with gradients enabled, not {found}")
        params = [p for path in self._handle.layers for p in self._parameters(path) if p.requires_grad]
        if any(hasattr(param, "to_local") for param in params):
            raise ValueError(
                "fisher='true' needs whole weights, but these are sharded (FSDP). Use fisher='empirical' or 'improved'"
            )
        if self._random is None or self._random.device != outputs.device:
            rank = dist.get_rank(self._group) if world_size(self._group) > 1 else 0
            self._random = torch.Generator(outputs.device).manual_seed(self._seed + rank)
        with torch.enable_grad():
            losses = sampled_losses(
                outputs, likelihood, axis=self._method.output_axis, class_axis=class_axis, generator=self._random
            )
            # Not loss_scale(): before the loop has scaled its first loss there is no scale yet.
            total = losses.sum() if self._scaler is None else self._scaler.scale(losses.sum())
            with self._policy.drawing():
                torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)

    def check_loss(self, loss: Tensor) -> None:
        """Raises ValueError if the loss was reduced in another way than `reduction` says, where its graph tells.

        `step(closure)` and `adapt` do so by themselves where it matters. See `fngd.guards.reduction_of`.

        >>> model = nn.Linear(3, 1)
        >>> opt = fngd.NGD(model, lr=0.1, reduction="sum")
        >>> opt.check_loss(nn.functional.mse_loss(model(torch.randn(8, 3)), torch.zeros(8, 1)))
        Traceback (most recent call last):
        ...
        ValueError: the training loss is a mean over the batch...
        """
        found = reduction_of(loss)
        if found is not None and found != self._method.reduction:
            raise ValueError(
                f"the training loss is a {found} over the batch, but the optimiser was constructed with "
                f"reduction={self._method.reduction!r}. Give it reduction={found!r}, or reduce the loss that way"
            )

    def _check_where_it_matters(self, loss: Any) -> None:
        method = self._method
        free = method.damping is None and method.scale != "per_layer" and method.kl_clip is None
        if isinstance(loss, Tensor) and not (free and method.fisher == "empirical" and self._adaptive is None):
            self.check_loss(loss)

    @property
    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """For each layer what the latest backward pass did to it, see `fngd.diagnostics`; needs diagnostics=True.

        >>> model = nn.Linear(3, 1)
        >>> opt = fngd.NGD(model, lr=0.1, diagnostics=True)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> opt.step()
        >>> sorted(opt.diagnostics[""])
        ['cosine', 'damping', 'effective_rank', 'mean', 'share', 'spread']
        """
        if self._policy.recorder is None:
            raise ValueError("nothing was recorded; construct the optimiser with diagnostics=True")
        return self._policy.recorder.figures()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent to gather factors, with gram='global'; DDP's own are not counted.

        >>> fngd.NGD(nn.Linear(3, 1), lr=0.1, gram="global").bytes_sent  # one process has nobody to send to
        0
        """
        return self._policy.exchange.bytes_sent

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

    def adapt(self, before: float | Tensor, after: float | Tensor) -> float:
        """Changes the damping by how well the last step was predicted; returns the ratio ρ, see `fngd.adaptive`.

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

    def _clipped(self) -> dict[Tensor, Tensor]:
        """The gradients of preconditioned layers times ν, by parameter; empty without a KL clip."""
        inner = self._policy.inner
        if self._method.kl_clip is None or not inner:
            return {}
        passes: list[list[tuple[Any, Tensor]]] = []
        for layer, values in inner.items():
            rate = self._option(layer, "lr", 0.0)
            for number, value in enumerate(values):
                passes += [[] for _ in range(number + 1 - len(passes))]
                passes[number].append((rate, value))
        scale = kl_clip_bound(passes, self._method.kl_clip, self._group)
        params = [param for layer in inner for param in self._parameters(layer)]
        return {p: _times(p.grad, scale) for p in params if p.grad is not None}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the gradients in `.grad`; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._check_where_it_matters(loss)
        if self._predicted is not None:
            raise ValueError(
                "the damping is to adapt, but adapt() was not called after the step that was measured. After each "
                "step: if opt.measuring: opt.adapt(loss, the same loss computed again)"
            )
        sharded = any(hasattr(param, "to_local") for param in self.param_groups[0]["params"])
        if self._completed % CHECK_EVERY == 0 and not sharded:
            self._unchanged.check()
        clipped = self._clipped()
        before = self._before()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                first_order_step(group, params, [clipped.get(param, param.grad) for param in params], self.state)
        if before:
            self._predicted = self._predict(before)
        self._completed += 1
        self._end_batch()
        return loss

    def _before(self) -> dict[Tensor, Tensor]:
        """Copies of the parameters, where this step's change of the loss is to be predicted."""
        if not self._policy.models:
            return {}
        moving = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if any(hasattr(param, "to_local") for param in moving):
            raise ValueError("adapt_damping needs whole parameters, but these are sharded (FSDP); leave it out")
        return {param: param.detach().clone() for param in moving}

    def _predict(self, before: dict[Tensor, Tensor]) -> Tensor:
        """M(δ) − M(0) of the step that led away from `before`."""
        change = torch.zeros((), dtype=torch.float64, device=next(iter(before)).device)
        inside: set[Tensor] = set()
        for model in self._policy.models.values():
            delta: dict[str, Pair] = {}
            for path, plain in model.plain.items():
                own = self._model.get_submodule(path)._parameters
                weight, bias = (
                    None if part is None else self._moved(own[name], before)
                    for name, part in zip(("weight", "bias"), plain, strict=True)
                )
                delta[path] = weight, bias
                inside.update(self._parameters(path))
            change += model.change(delta).to(change.device)
        for param, old in before.items():
            if param not in inside and param.grad is not None:
                change += (param.grad.double() * (param - old)).sum().to(change.device)
        return change

    @staticmethod
    def _moved(param: Any, before: Mapping[Tensor, Tensor]) -> Tensor:
        return param - before[param] if param in before else torch.zeros_like(param)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. A batch whose step was skipped (by a GradScaler that met inf) ends here."""
        if self._policy.met_batch:
            self._end_batch()
        super().zero_grad(set_to_none)

    def _end_batch(self) -> None:
        self._policy.end_batch()
        self._policy.measuring = self._adaptive is not None and self._completed % self._adaptive.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state, and by name what else a run needs to go on.

        "coefficients": the table and the place in the epoch; "adaptive": the factor on the damping and the steps
        made; "sampling": the state of the random numbers.
        """
        state = super().state_dict()
        if self._table is not None:
            state["coefficients"] = self._table.state_dict()
        if self._adaptive is not None:
            state["adaptive"] = {"factor": self.damping_factor, "completed": self._completed}
        if self._random is not None:
            state["sampling"] = self._random.get_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors go to the device of the parameters.

        Raises ValueError if the state holds no coefficients, or those of a loader of another length.
        """
        device = self.param_groups[0]["params"][0].device
        if self._table is not None:
            if "coefficients" not in state_dict:
                raise ValueError("the state has no 'coefficients': it was not saved by an optimiser that shares them")
            self._table.load_state_dict(state_dict["coefficients"], device)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        if self._adaptive is not None:
            saved = state_dict.get("adaptive", {"factor": 1.0, "completed": 0})  # or it was not adaptive
            self._policy.damping_factor, self._completed = saved["factor"], saved["completed"]
        if "sampling" in state_dict:
            self._random = torch.Generator(device)
            self._random.set_state(state_dict["sampling"].cpu())
        self._predicted = None
        self._policy.clear()
        self._policy.measuring = self._adaptive is not None and self._completed % self._adaptive.every == 0

    def explain(self) -> dict[str, str]:
        """Returns for each linear and convolution layer whether it is preconditioned, and why not.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> opt = fngd.NGD(model, lr=0.1)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> opt.explain()
        {'0': 'reweighted, samples on axis 0 of its output'}
        """
        return self._handle.explain()

    def remove(self) -> None:
        """Takes the hooks off the model, which then trains with plain gradients. Harmless when repeated.

        >>> model = nn.Linear(3, 1)
        >>> fngd.NGD(model, lr=0.1).remove()
        >>> opt = fngd.NGD(model, lr=0.2)  # a second one, as the first is gone
        """
        self._handle.remove()


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """grad·factor; a sharded tensor (FSDP) multiplies only with its like, so there each process scales its part."""
    if not hasattr(grad, "to_local"):
        return grad * factor
    local, placing = grad.to_local() * factor, (grad.device_mesh, grad.placements)  # type: ignore[attr-defined]
    return type(grad).from_local(local, *placing, shape=grad.shape, stride=grad.stride())  # type: ignore[attr-defined]
