"""What KFAC, SKFAC, Eva and Shampoo share: directions in place of gradients, then a first-order step.

The ordinary backward pass is not changed: `persample.reweight` only shows each layer's inputs and output
gradients to the method. `step` takes what is in `.grad` by then (unscaled, clipped, averaged over
processes), preconditions it layer by layer, scales it by the KL clip, and hands it to SGD or AdamW.
`.grad` itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from fngd.distributed import Exchange, sharded_like, whole_tensor, world_size
from fngd.first_order import first_order_step
from fngd.groups import check_group, completed_group, first_order_groups, positive, whole
from fngd.joint import Found, Ranks
from fngd.kl_clip import kl_clip_factor
from fngd.members import Part, attention_parameters, is_function, members, parameter_of, unseen
from fngd.sharers import conflicts, never_preconditioned
from fngd.statistics import Factors, Statistics
from persample import LayerGrads, reweight

REDUCTIONS = ("mean", "sum")
State = dict[str, Tensor]
"""Tensors of one layer by name."""


@runtime_checkable
class Method(Protocol):
    """How a layer-wise method turns statistics into a direction. Pure: it keeps nothing but its options."""

    def collect(self, factors: Factors, *, bias: bool, convolution: bool, random: torch.Generator) -> Statistics:
        """Returns what to remember of a backward pass."""

    def combine(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the statistics of both backward passes together."""

    def joined(self, found: Found, ranks: Ranks) -> dict[str, Statistics]:
        """Returns the statistics of the batch that the processes have together, the same in each of them."""

    def update(self, old: State | None, new: Statistics, reduction: str) -> State:
        """Returns the running factors and "count"; `old` where the new statistics are not finite."""

    def invert(self, running: State, damping: float) -> State:
        """Returns what `direction` needs."""

    def direction(self, inverse: State, grad: Float[Tensor, "groups out inp"], damping: float) -> Tensor:
        """Returns the preconditioned gradient, of the same shape."""


class Preconditioned(Optimizer):
    """Base: `_directions` gives preconditioned gradients, every other parameter takes the plain one."""

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._completed = 0
        super().__init__(groups, {"precondition": True, "rule": "sgd", **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; as in `torch.optim.Optimizer`, with the options checked."""
        super().add_param_group(completed_group(param_group))
        check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the gradients in `.grad`; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        directions = self._directions()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                first_order_step(group, params, [directions.get(param, param.grad) for param in params], self.state)
        self._completed += 1
        return loss

    def _directions(self) -> dict[Tensor, Tensor]:
        """Preconditioned gradients by parameter."""
        raise NotImplementedError(f"{type(self).__name__} defines _directions")


class LayerPreconditioned(Preconditioned):
    """Base of KFAC, SKFAC and Eva: statistics of linear and convolution layers, gathered as they are met."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        method: Method,
        defaults: dict[str, Any],
        *,
        statistics_every: int,
        inverse_every: int,
        kl_clip: float | None,
        reduction: str,
        other: str,
        other_options: Mapping[str, Any] | None,
        scaler: Any,
        seed: int,
        process_group: Any,
        batch_axis: int | Mapping[str, int] | None,
        functions: bool,
    ) -> None:
        whole("statistics_every", statistics_every)
        whole("inverse_every", inverse_every)
        if kl_clip is not None:
            positive("kl_clip", kl_clip)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is unknown; choose one of {list(REDUCTIONS)}")
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise ValueError(f"scaler={type(scaler).__name__}; it must be the GradScaler that scales the loss, or None")
        self._method, self._reduction, self._kl_clip, self._scaler = method, reduction, kl_clip, scaler
        self._statistics_every, self._inverse_every = statistics_every, inverse_every
        self._running: dict[str, State] = {}
        self._inverses: dict[str, State] = {}
        self._pending: dict[str, Statistics] = {}
        self._random = torch.Generator().manual_seed(seed)
        self._drawn_from = self._random.get_state()
        self._process_group, self._exchange = process_group, Exchange(process_group)
        self._model = model
        self._plain = never_preconditioned(model)
        self._layers = dict(_layers(model, self._plain))
        self._functions: set[str] = set()  # met so far
        self._agreed: list[str] | None = None  # functions that every process has met; None: not asked yet
        self._with_functions = functions
        chosen: set[Tensor] = set(attention_parameters(model)) if functions else set()
        for module in self._layers.values():
            chosen.update(param for param in module._parameters.values() if param is not None)
        groups = first_order_groups(model.parameters() if params is None else params, chosen, other, other_options)
        super().__init__(groups, defaults)
        # Last: nothing that can raise may come after the hooks are in place.
        self._handle = reweight(model, self._observe, batch_axis=batch_axis, functions=functions)

    def _find_groups(self) -> None:
        """Notes each parameter's group by its number: loading a state makes new groups, and FSDP swaps parameters."""
        self._group_of = {param: number for number, group in enumerate(self.param_groups) for param in group["params"]}
        self._numbers = {
            layer: (self._number(module._parameters.get("weight")), self._number(module._parameters.get("bias")))
            for layer, module in self._layers.items()
        }

    def _number(self, param: Tensor | None) -> int | None:
        return None if param is None else self._group_of.get(param)

    def _members(self, layer: str) -> tuple[dict[str, Any], Part, Part | None] | None:
        """(group of the weight, weight, bias) where they are preconditioned; bias None where it is not, or is none."""
        plain = layer in self._plain or self._unknown_elsewhere(layer)
        weight, bias = (None, None) if plain else members(self._handle, layer)
        if weight is None:
            return None
        if layer not in self._numbers:  # a function
            self._numbers[layer] = self._number(weight.param), None if bias is None else self._number(bias.param)
        own, others = (None if number is None else self.param_groups[number] for number in self._numbers[layer])
        if own is None or not own["precondition"]:
            return None
        if bias is not None and not (bias.param.requires_grad and others is not None and others["precondition"]):
            bias = None
        return own, weight, bias

    def _find_functions(self) -> None:
        """Notes the functions that the forward passes have shown, and which of them cannot be preconditioned."""
        explained = self._handle.explain()
        self._functions = {path for path in self._handle.layers if is_function(self._handle, path)}
        used = {path: members(self._handle, path) for path, why in explained.items() if why.startswith("reweighted")}
        self._plain |= conflicts(self._model, used, self._functions)

    def _unknown_elsewhere(self, layer: str) -> bool:
        return self._agreed is not None and layer in self._functions and layer not in self._agreed

    def _observe(self, layer: str, grads: LayerGrads) -> None:
        """The policy: looks, and asks for the plain gradient."""
        if layer not in self._functions and is_function(self._handle, layer):
            self._find_functions()
        found = None if self._completed % self._statistics_every else self._members(layer)
        if found is None:
            return
        _, _, bias = found
        factors = grads.factors()
        if self._scaler is not None:
            # A public way to learn the scale that does not wait for the device.
            scale = self._scaler.scale(torch.ones((), device=grads.device))
            factors = [(x, z / scale) for x, z in factors]
        if not self._pending:
            self._drawn_from = self._random.get_state()
        convolution = not isinstance(self._layers.get(layer), nn.Linear | None)
        new = self._method.collect(factors, bias=bias is not None, convolution=convolution, random=self._random)
        before = self._pending.get(layer)
        self._pending[layer] = new if before is None else self._method.combine(before, new)

    def _directions(self) -> dict[Tensor, Tensor]:
        several = world_size(self._process_group) > 1
        if several and self._agreed is None:  # a process that has not met a function knows nothing of its weight
            self._agreed = sorted(self._exchange.common(self._functions))
        if several and self._completed % self._statistics_every == 0:
            # Every process takes part, whatever it has met: factors of its own would let the weights drift apart.
            device = self.param_groups[0]["params"][0].device
            functions = [path for path in self._agreed or () if path not in self._layers]
            ranks = Ranks(self._exchange, (*self._layers, *functions), device, self._reduction == "mean")
            self._pending = self._method.joined(self._pending, ranks)
        for layer, found in self._pending.items():
            self._running[layer] = self._method.update(self._running.get(layer), found, self._reduction)
        self._pending.clear()
        parts: list[tuple[dict[str, Any], Part, Part | None, Tensor, Tensor]] = []
        result: dict[Tensor, Tensor] = {}
        for layer, running in self._running.items():
            found_members = self._members(layer)
            if found_members is None:
                continue
            group, weight, bias = found_members
            if weight.param.grad is None or (bias is not None and bias.param.grad is None):
                continue
            damping = group["damping"]
            if layer not in self._inverses or self._completed % self._inverse_every == 0:
                self._inverses[layer] = {**self._method.invert(running, damping), "count": running["count"]}
            inverse, groups = self._inverses[layer], running["inputs"].shape[0]
            weight_grad, bias_grad = _gradient(weight), None if bias is None else _gradient(bias)
            grad = as_matrix(weight_grad, bias_grad, groups).to(running["inputs"].dtype)
            direction = self._method.direction(inverse, grad, damping)
            # Before the first finite statistics there is nothing to precondition with.
            direction = torch.where(inverse["count"] > 0, direction, grad)
            parts.append((group, weight, bias, grad, direction))
        if not parts:
            return result
        directions = [part[-1] for part in parts]
        if self._kl_clip is not None:
            inner = [torch.sum(part[-1] * part[-2]) for part in parts]
            nu = kl_clip_factor(inner, [part[0]["lr"] for part in parts], self._kl_clip)
            directions = [direction * nu for direction in directions]
        for (_, weight, bias, _, _), direction in zip(parts, directions, strict=True):
            if bias is not None:
                _put(result, bias, direction[..., -1])
                direction = direction[..., :-1]
            _put(result, weight, direction)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the statistics of a step that a GradScaler has skipped, as if it had not been."""
        if self._pending:
            self._random.set_state(self._drawn_from)
            self._pending.clear()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; as in `torch.optim.Optimizer`, with the options checked."""
        super().add_param_group(param_group)
        self._find_groups()

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state and, under "preconditioner", the running factors and inverses."""
        own = {
            "method": type(self).__name__,
            "completed": self._completed,
            "running": {layer: dict(state) for layer, state in self._running.items()},
            "inverses": {layer: dict(state) for layer, state in self._inverses.items()},
            "random": self._random.get_state(),
        }
        return {**super().state_dict(), "preconditioner": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors go to the device of their layer.

        Raises ValueError if the state was saved by another method or names layers that the model has not.
        """
        own = checked_state(state_dict, type(self).__name__)
        others = set(own["running"]) - set(self._layers)
        unknown = sorted(layer for layer in others if parameter_of(self._model, layer) is None)
        if unknown:
            raise ValueError(
                f"the state has factors of layers {unknown}; this model's layers are {sorted(self._layers)}"
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._completed = own["completed"]
        self._random.set_state(own["random"].cpu())
        self._agreed = None
        self._running, self._inverses = (self._placed(own[name]) for name in ("running", "inverses"))
        self._pending.clear()

    def _placed(self, states: dict[str, State]) -> dict[str, State]:
        result = {}
        for layer, state in states.items():
            param = parameter_of(self._model, layer)
            assert param is not None, "load_state_dict has checked"
            result[layer] = {name: tensor.to(param.device, copy=True) for name, tensor in state.items()}
        return result

    def explain(self) -> dict[str, str]:
        """Returns for each linear and convolution layer and function whether it is preconditioned, and why not.

        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 1, 3))
        >>> opt = fngd.KFAC(model, lr=0.1)
        >>> model(torch.randn(8, 1, 5, 5)).square().mean().backward()
        >>> opt.explain()["0"]
        'preconditioned, samples on axis 0 of its output'
        """
        self._find_functions()
        result = {}
        for path, reason in self._handle.explain().items():
            if path in self._plain:
                reason = f"plain: {self._plain[path]}"
            elif self._unknown_elsewhere(path):
                reason = "plain: not every process had used it when they agreed on functions, in their first step"
            elif reason.startswith("reweighted") and members(self._handle, path)[0] is None:
                reason = "plain: its bias is no parameter, nor rows of one"
            elif reason.startswith("reweighted") and self._members(path) is None:
                reason = "plain: its weight is in no group with precondition=True"
            result[path] = reason.replace("reweighted", "preconditioned")
        return result | unseen(self._model, list(result), functions=self._with_functions)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has contributed to joining statistics (see `fngd.joint`); DDP's own are not counted.

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


def checked_state(state_dict: Mapping[str, Any], method: str) -> Any:
    """Returns the part of a state that is not torch's; raises ValueError where another method saved it."""
    own = state_dict.get("preconditioner")
    if own is None or own["method"] != method:
        saved = "no preconditioner" if own is None else f"one of {own['method']}"
        raise ValueError(f"the state has {saved}; this optimiser is {method}. Load what its own state_dict() returned.")
    return own


def as_matrix(weight: Tensor, bias: Tensor | None, groups: int) -> Float[Tensor, "groups out inp"]:
    """Returns weight (and bias, as the last column) as one matrix a group; the weight is [out, inp / groups, *kernel].

    >>> as_matrix(torch.zeros(6, 2, 3, 3), torch.zeros(6), 2).shape
    torch.Size([2, 3, 19])
    """
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, -1, 1)], 2)


def _gradient(part: Part) -> Tensor:
    assert part.param.grad is not None, "checked by the caller"
    return part.of(whole_tensor(part.param.grad))


def _put(result: dict[Tensor, Tensor], part: Part, direction: Tensor) -> None:
    """Writes rows of a parameter's direction; rows that no layer has keep the gradient."""
    param = part.param
    rows = direction.reshape(part.of(param).shape).to(param.dtype)
    if part.whole:
        result[param] = sharded_like(rows, param)
    else:
        assert param.grad is not None, "checked by the caller"
        result.setdefault(param, param.grad.clone())[part.start : part.stop] = rows


def _layers(model: nn.Module, plain: Mapping[str, str]) -> Iterable[tuple[str, nn.Module]]:
    """Layers that may be preconditioned, by path."""
    for path, module in model.named_modules():
        kind = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if kind and path not in plain and module._parameters.get("weight") is not None:
            yield path, module
