"""What KFAC, SKFAC and Eva share: statistics of layers, gathered in backward passes, that precondition gradients.

The ordinary backward pass is not changed: `persample.reweight` only shows each layer's inputs and output
gradients to the method. Gradients are preconditioned layer by layer, and scaled together by the KL clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fngd.kronecker.layers.chosen import Chosen
from fngd.kronecker.layers.matrices import as_matrix, gradient_of, put
from fngd.kronecker.method import Method, State, Step
from fngd.kronecker.processes import Ranks, shared_out
from fngd.kronecker.saved_state import check_factors, moved, placed
from fngd.kronecker.statistics import Factors, Statistics
from fngd.optim.coverage import told
from fngd.optim.discarded_passes import FirstPass
from fngd.optim.distributed import Exchange, world_size
from fngd.optim.groups import check_scaler, first_order_groups, first_parameter, sgd_options
from fngd.optim.guards import CheckedLoss, Unchanged
from fngd.optim.kl_clip import kl_clip_factor
from fngd.optim.layers import Part
from fngd.optim.loss_scale import FirstScale
from fngd.optim.preconditioned import Preconditioned, checked_state
from fngd.optim.state.parts import check_state, not_compiled
from persample import LayerGrads, Reweighting, reweight
from persample.reweighting import BatchAxis

REDUCTIONS = ("mean", "sum")


class LayerPreconditioned(CheckedLoss, Preconditioned):
    """Base of KFAC, SKFAC and Eva: statistics of linear and convolution layers, gathered as they are met."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        method: Method,
        statistics_every: int,
        inverse_every: int,
        seed: int = 0,
        *,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        damping: float = 0.03,
        kl_clip: float | None = 1e-3,
        reduction: str = "mean",
        curvature_samples: int | None = None,
        other: str = "sgd",
        other_options: Mapping[str, Any] | None = None,
        scaler: Any = None,
        process_group: Any = None,
        divide_inverses: bool = False,
        batch_axis: BatchAxis | None = None,
        functions: bool = True,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is unknown; choose one of {list(REDUCTIONS)}")
        check_scaler(scaler)
        self._method, self._reduction, self._kl_clip, self._scaler = method, reduction, kl_clip, scaler
        self._statistics_every, self._inverse_every = statistics_every, inverse_every
        self._curvature_samples, self._divide = curvature_samples, divide_inverses
        self._running: dict[str, State] = {}
        self._inverses: dict[str, State] = {}
        self._pending: dict[str, Statistics] = {}
        self._first = FirstPass()
        self._scale: FirstScale | None = FirstScale(reduction, scaler)
        self._random = torch.Generator().manual_seed(seed)
        self._drawn_from = self._random.get_state()
        self._process_group, self._exchange = process_group, Exchange(process_group)
        self._model = model
        self._chosen = Chosen(model, functions=functions)
        chosen = self._chosen.parameters()
        groups = first_order_groups(model.parameters() if params is None else params, chosen, other, other_options)
        defaults = sgd_options(lr, momentum, nesterov, weight_decay, decoupled_weight_decay, damping=damping)
        super().__init__(groups, defaults, model, other)
        # Last: nothing that can raise may come after the hooks are in place.
        self._handle = self._chosen.handle = reweight(model, self._observe, batch_axis=batch_axis, functions=functions)

    def _look_at(self, loss: Any) -> None:
        if isinstance(loss, Tensor):
            self.check_loss(loss)

    def _observe(self, layer: str, grads: LayerGrads) -> None:
        """The policy: looks, and asks for the plain gradient."""
        self._chosen.meet(layer)
        found = None if self._completed % self._statistics_every else self._chosen.members(layer, self.param_groups)
        if found is None or not grads.batch_size or not self._chosen.has_factors(layer, grads):
            return
        if self._scale is not None:
            self._scale.see(grads, self.param_groups)
        _, _, bias = found
        factors: Factors = grads.factors()
        if self._scaler is not None:
            # A public way to learn the scale that does not wait for the device.
            scale = self._scaler.scale(torch.ones((), device=grads.device))
            factors = [(x, z / scale) for x, z in factors]
        factors = self._some_samples(factors, grads.batch_size)
        weight = found[1].param
        if self._pending and self._first.discarded(weight, self.param_groups):
            self._forget()
        if not self._pending:
            self._first.begin(weight)
            self._drawn_from = self._random.get_state()
        convolution = factors[0][0].dim() > 4  # its patches have axes of the kernel
        new = self._method.collect(factors, bias=bias is not None, convolution=convolution, random=self._random)
        before = self._pending.get(layer)
        self._pending[layer] = new if before is None else self._method.combine(before, new)

    def _some_samples(self, factors: Factors, batch: int) -> Factors:
        """The first samples, if fewer than all are asked for, as if the loss were the mean over these."""
        count = self._curvature_samples
        if count is None or count >= batch:
            return factors
        share = batch / count if self._reduction == "mean" else 1.0
        return [(x[:count], z[:count] * share) for x, z in factors]

    def _directions(self) -> dict[Tensor, Tensor]:
        if self._scale is not None:
            self._scale.look(self.param_groups, type(self).__name__)
            self._scale = None
        self._unchanged.look(self.param_groups)
        self._chosen.look()
        ranks = None
        if world_size(self._process_group) > 1:
            layers = self._chosen.agree(self._exchange)
            device = first_parameter(self.param_groups).device
            ranks = Ranks(self._exchange, layers, device, self._reduction == "mean")
            if self._completed % self._statistics_every == 0:
                # Every process takes part, whatever it has met: factors of its own would let the weights drift apart.
                self._pending = self._method.joined(self._pending, ranks)
        for layer, found in self._pending.items():
            self._update(layer, found)
        stepped = {layer: there for layer in self._running if (there := self._found(layer)) is not None}
        renewed = self._completed % self._inverse_every == 0
        due = {layer: each[0] for layer, each in stepped.items() if renewed or layer not in self._inverses}
        self._invert(due, ranks if renewed else None)  # that all of them renew in this step, every process knows
        self._method.refine(Step(self._inverses, self._running, self._pending, ranks, self._reduction))
        self._pending.clear()
        if not stepped:
            return {}
        directions = []
        for layer, (group, _, _, grad) in stepped.items():
            inverse = self._inverses[layer]
            direction = self._method.direction(inverse, grad, group["damping"])
            # Before the first finite statistics there is nothing to precondition with.
            directions.append(torch.where(inverse["count"] > 0, direction, grad))
        if self._kl_clip is not None:
            inner = [torch.sum(d * part[-1]) for d, part in zip(directions, stepped.values(), strict=True)]
            nu = kl_clip_factor(inner, [group["lr"] for group, _, _, _ in stepped.values()], self._kl_clip)
            directions = [direction * nu for direction in directions]
        result: dict[Tensor, Tensor] = {}
        for (_, weight, bias, _), direction in zip(stepped.values(), directions, strict=True):
            if bias is not None:
                put(result, bias, direction[..., -1])
                direction = direction[..., :-1]
            put(result, weight, direction)
        return result

    def _update(self, layer: str, found: Statistics) -> None:
        """Takes new statistics into the running factors."""
        old = self._running.get(layer)
        if old is not None and _form(old["inputs"], old["outputs"]) != _form(found.inputs, found.outputs):
            for states in (self._running, self._inverses):  # its bias was frozen, or thawed: of another size
                states.pop(layer, None)
        for states in (self._running, self._inverses):
            if layer in states:
                states[layer] = moved(states[layer], found.inputs)
        self._running[layer] = self._method.update(self._running.get(layer), found, self._reduction)

    def _invert(self, due: Mapping[str, dict[str, Any]], ranks: Ranks | None) -> None:
        """Computes the inverses of these layers, whose groups are given; with divide_inverses each by one process."""

        def inverse(layer: str) -> State:
            running, before = self._running[layer], self._inverses.get(layer)
            return {**self._method.invert(running, due[layer]["damping"], before), "count": running["count"]}

        found: dict[str, State] = {}
        if ranks is not None and self._divide:
            costs = {layer: sum(n**3 for n in self._method.sizes(self._running[layer])[1:]) for layer in due}
            found = shared_out(costs, inverse, ranks)
        for layer in due:
            self._inverses[layer] = found[layer] if layer in found else inverse(layer)

    def _found(self, layer: str) -> tuple[dict[str, Any], Part, Part | None, Tensor] | None:
        """(group, weight, bias, gradient as a matrix) of a layer that this step preconditions."""
        found = self._chosen.members(layer, self.param_groups)
        if found is None:
            return None
        group, weight, bias = found
        if weight.param.grad is None or (bias is not None and bias.param.grad is None):
            return None
        running = self._running[layer]
        groups, _, features = self._method.sizes(running)
        weight_grad, bias_grad = gradient_of(weight), None if bias is None else gradient_of(bias)
        grad = as_matrix(weight_grad, bias_grad, groups).to(running["inputs"].dtype)
        # Its bias was frozen, or thawed, and no statistics since.
        return None if grad.shape[-1] != features else (group, weight, bias, grad)

    def _preconditioned(self, directions: Mapping[Tensor, Tensor]) -> tuple[list[Part], Callable[[Tensor], str]]:
        return told(self._model, self._handle, self.explain(), functions=self._chosen.functions)

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the statistics of a step that a GradScaler has skipped, as if it had not been."""
        self._forget()
        super().zero_grad(set_to_none)

    def _forget(self) -> None:
        if self._pending:
            self._random.set_state(self._drawn_from)
            self._pending.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; as in `torch.optim.Optimizer`, with the options checked."""
        super().add_param_group(param_group)
        self._chosen.find_groups(self.param_groups)
        self._unchanged = Unchanged(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state and, under "preconditioner", the running factors and inverses."""
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors go to the device of their layer.

        Raises ValueError if the state was saved by another method or names layers that the model has not.
        """
        super().load_state_dict(state_dict)

    def _own_state(self) -> dict[str, Any]:
        own = {
            "method": type(self).__name__,
            "completed": self._completed,
            "running": {layer: dict(state) for layer, state in self._running.items()},
            "inverses": {layer: dict(state) for layer, state in self._inverses.items()},
            "random": self._random.get_state(),
        }
        return {"preconditioner": own}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        own = checked_state(state, type(self).__name__)
        check_state(state, self.param_groups, self.defaults)
        check_factors(own, self._model, self._method, self._chosen.modules)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        own = state["preconditioner"]
        self._completed = own["completed"]
        self._random.set_state(own["random"].cpu())
        self._chosen.forget_agreement()
        self._running, self._inverses = (placed(self._model, own[name]) for name in ("running", "inverses"))
        self._pending.clear()

    def explain(self) -> dict[str, str]:
        """Returns for each linear and convolution layer and function whether it is preconditioned, and why not.

        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 1, 3))
        >>> opt = fngd.KFAC(model, lr=0.1)
        >>> model(torch.randn(8, 1, 5, 5)).square().mean().backward()
        >>> opt.explain()["0"]
        'preconditioned, samples on axis 0 of its output'
        """
        return self._chosen.explain(self.param_groups)

    @property
    def handle(self) -> Reweighting:
        """The handle of `persample.reweight` on the model: its layers, and a way to watch what they are answered.

        >>> fngd.KFAC(nn.Linear(3, 1), lr=0.1).handle.layers
        ('',)
        """
        return self._handle

    def paused(self) -> AbstractContextManager[None]:
        """Returns a context in which passes through the model are plain, and none of this optimiser's backward passes.

        For gradients that are differentiated again, as a gradient penalty's: run the forward pass inside. What its
        backward pass adds to `.grad` is the plain gradient; `step` preconditions it with
        statistics of the passes outside.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> opt, x = fngd.KFAC(model, lr=0.1), torch.randn(8, 3, requires_grad=True)
        >>> with opt.paused():
        ...     [slope] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        >>> penalty = (slope.norm(dim=1) - 1).square().mean()
        >>> (model(x).mean() + penalty).backward()
        >>> opt.step()
        """
        return self._handle.paused()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has contributed to joining statistics (see `fngd.kronecker.processes`); DDP's own are
        not counted.

        >>> fngd.SKFAC(nn.Linear(3, 1), lr=0.1).bytes_sent  # one process alone sends nothing
        0
        """
        return self._exchange.bytes_sent

    def remove(self) -> None:
        """Takes the hooks off the model: factors stay as they are. Harmless when repeated.

        >>> model = nn.Linear(3, 1)
        >>> fngd.Eva(model, lr=0.1).remove()
        >>> opt = fngd.KFAC(model, lr=0.1)  # a second one, as the first is gone
        """
        self._handle.remove()


def _form(inputs: Tensor, outputs: Tensor) -> tuple[int, int]:
    """What changes where a bias joins its layer, or leaves it."""
    return inputs.shape[-1], outputs.dim()
