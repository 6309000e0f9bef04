"""Shampoo: one matrix of second moments for each dimension of a parameter.

    symbol   meaning                                                                   shape
    g        gradient of a parameter, or a block of it, with k ≥ 2 dimensions          [n_1, …, n_k]
    g_(i)    g with dimension i first and the others flattened                         [n_i, N / n_i]
    L_i      running Σ g_(i) g_(i)ᵀ                                                    [n_i, n_i]
    ε        regularisation, relative to the largest eigenvalue of L_i

    v = g ×_1 (L_1 + ελ_max I)^(−1/2k) … ×_k (L_k + ελ_max I)^(−1/2k),    then scaled to ‖g‖

(Gupta, Koren, Singer 2018, Algorithm 2; blocks and grafting: Anil et al. 2020.) Parameters are cut into blocks of at
most `block` entries along each dimension. The blocks of one parameter are grafted together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.kronecker.kfac import symmetric_eigen
from fngd.optim.distributed import sharded_like, whole_tensor
from fngd.optim.groups import sgd_options
from fngd.optim.layers import Part
from fngd.optim.preconditioned import Preconditioned, checked_state
from fngd.optim.presets import with_presets
from fngd.optim.state.forms import COUNT, REMEDY, Table, check_form
from fngd.optim.state.parts import check_state

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    "shampoo-pytorch": {
        "nesterov": True, "block": 128, "epsilon": 1e-12, "decay": 1.0, "statistics_every": 10, "inverse_every": 100,
    },
}  # fmt: skip


def unfolded_moment(grad: Tensor, axis: int) -> Float[Tensor, "n n"]:
    """Returns g_(i) g_(i)ᵀ for dimension i = `axis`."""
    rows = grad.movedim(axis, 0).flatten(1)
    return rows @ rows.mT


def inverse_root(moment: Float[Tensor, "n n"], root: int, epsilon: float) -> Float[Tensor, "n n"]:
    """Returns (L + ελ_max I)^(−1/root) by eigen-decomposition; the identity where L = 0. Waits for the device.

    >>> inverse_root(torch.diag(torch.tensor([16.0, 1.0])), 4, 1e-12)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    values, vectors = symmetric_eigen(moment)
    largest = values[-1]
    # in float32 eigenvalues below the rounding of the largest are noise, and ε·λ_max is far below that
    values = torch.where(largest > 0, values + epsilon * largest, 1.0)
    return (vectors * values ** (-1 / root)) @ vectors.mT


def shampoo_direction(grad: Tensor, roots: Iterable[Tensor]) -> Tensor:
    """Returns g multiplied along each dimension i by the i-th matrix: g ×_1 R_1 … ×_k R_k (each symmetric)."""
    for axis, matrix in enumerate(roots):
        grad = torch.tensordot(matrix, grad, dims=([1], [axis])).movedim(0, axis)
    return grad


def grafted(direction: Tensor, grad: Tensor) -> Tensor:
    """Returns the direction with the length of the gradient; zeros where the direction is zero."""
    length = torch.linalg.vector_norm(direction)
    return direction * torch.where(length > 0, torch.linalg.vector_norm(grad) / length, 0.0)


def merged_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Returns the shape with neighbouring dimensions merged while their product is at most `block`.

    >>> merged_shape((64, 16, 3, 3), 128)
    (64, 48, 3)
    """
    result, size = [], 1
    for dimension in shape:
        if size * dimension <= block:
            size *= dimension
        else:
            result += [size] if size > 1 else []
            size = dimension
    return tuple(result + ([size] if size > 1 else []))


def block_slices(shape: tuple[int, ...], block: int) -> list[tuple[slice, ...]]:
    """Returns the indices of the blocks of a tensor, at most `block` entries along each dimension.

    >>> len(block_slices((300, 100), 128))
    3
    """
    starts = ([slice(at, min(at + block, size)) for at in range(0, size, block)] for size in shape)
    return list(product(*starts))


class Shampoo(Preconditioned):
    """Blocked Shampoo, grafted on SGD; a `torch.optim.Optimizer`.

        v = g ×_1 L_1^(−1/2k) … ×_k L_k^(−1/2k) · ‖g‖/‖…‖,    L_i ← L_i + g_(i) g_(i)ᵀ,    θ ← SGD(θ, v)

    for every parameter of k ≥ 2 dimensions (Gupta et al. 2018; Anil et al. 2020; symbols: `fngd.shampoo`). The others
    get the plain gradient. It sees gradients alone and needs no model: parameters are given as to any optimiser.

    Arguments:
        params: parameters or parameter groups. A group may have its own lr, momentum, nesterov, weight_decay,
            decoupled_weight_decay, precondition (False: the plain gradient) and rule ("sgd" or "adamw").
        lr, momentum, nesterov, weight_decay, decoupled_weight_decay: as for `KFAC`.
        block: largest number of entries along a dimension of a block, ≥ 1.
        epsilon: ε > 0, relative to the largest eigenvalue.
        decay: weight of the old L_i; 1 adds up (the paper), below 1 is a moving average, 0 < decay ≤ 1.
        statistics_every, inverse_every: steps between updates of L_i and between roots, ≥ 1.
        graft: scale v to the length of g; False leaves the length to Shampoo.
        preset: "shampoo-pytorch" for the public code's step. Neighbouring dimensions are merged, first to last, while
            their product is at most `block`, [64, 16, 3, 3] to [64, 48, 3], and k is counted after that; a parameter
            with fewer than 2 dimensions left takes the plain gradient. L_i starts from εI; L_i is updated in the
            steps number statistics_every, 2·statistics_every, … and roots in inverse_every, 2·inverse_every, …, before
            which they are I. nesterov=True, its default, changes the momentum in place, m ← μ²m + (1 + μ)(v + weight
            decay), θ ← θ − lr·m: that of nesterov=False with μ² and (1 + μ)·lr.

    Raises:
        ValueError: an argument out of range.

    Approximate: roots are those of an earlier step; in float32 eigenvalues below 1e-7·λ_max are rounding noise. A
    gradient with inf or NaN leaves the statistics as they were.

    >>> layer = torch.nn.Linear(3, 1)
    >>> opt = Shampoo(layer.parameters(), lr=0.1)
    >>> layer(torch.randn(8, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()
    """

    @with_presets(PRESETS)
    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        block: int = 128,
        epsilon: float = 1e-12,
        decay: float = 1.0,
        statistics_every: int = 10,
        inverse_every: int = 100,
        graft: bool = True,
        preset: str | None = None,
    ) -> None:
        self._block, self._epsilon, self._decay, self._graft, self._preset = block, epsilon, decay, graft, preset
        self._statistics_every, self._inverse_every = statistics_every, inverse_every
        self._moments: dict[Tensor, list[list[Tensor]]] = {}  # of each block, of each dimension
        self._roots: dict[Tensor, list[list[Tensor]]] = {}
        defaults = sgd_options(lr, momentum, nesterov, weight_decay, decoupled_weight_decay)
        super().__init__(params, defaults)

    def _directions(self) -> dict[Tensor, Tensor]:
        result = {}
        for group in self.param_groups:
            for param in group["params"] if group["precondition"] else ():
                if param.grad is None or param.grad.is_sparse or param.grad.is_complex() or not param.numel():
                    continue
                shape = self._shape(param)
                if len(shape) >= 2:
                    result[param] = self._direction(param, shape)
        return result

    def _preconditioned(self, directions: Mapping[Tensor, Tensor]) -> tuple[list[Part], Callable[[Tensor], str]]:
        return [Part(param, 0, len(param)) for param in directions], self._why_plain

    def _why_plain(self, param: Tensor) -> str:
        if param.grad is not None and param.grad.is_sparse:
            return "its gradient is sparse"
        if param.is_complex():
            return "it is complex"
        return f"block={self._block} merges it into fewer than two axes"

    def _shape(self, param: Tensor) -> tuple[int, ...]:
        shape = tuple(param.shape)
        return shape if self._preset is None or len(shape) < 2 else merged_shape(shape, self._block)

    def _direction(self, param: Tensor, shape: tuple[int, ...]) -> Tensor:
        assert param.grad is not None, "checked by the caller"
        precision = torch.float32 if param.grad.element_size() < 4 else param.grad.dtype
        grad = whole_tensor(param.grad).reshape(shape).to(precision)
        blocks = block_slices(shape, self._block)
        for states in (self._moments, self._roots):
            if param in states:
                states[param] = _moved(states[param], grad)
        if param not in self._moments and self._preset is not None:
            self._moments[param], self._roots[param] = self._beginning([grad[where] for where in blocks])
        if self._due(self._statistics_every) or param not in self._moments:
            self._moments[param] = self._updated(self._moments.get(param), [grad[where] for where in blocks])
        if self._due(self._inverse_every) or param not in self._roots:
            self._roots[param] = [
                [inverse_root(moment, 2 * len(shape), self._epsilon) for moment in moments]
                for moments in self._moments[param]
            ]
        direction = torch.empty_like(grad)
        for where, roots in zip(blocks, self._roots[param], strict=True):
            direction[where] = shampoo_direction(grad[where], roots)
        if self._graft:
            direction = grafted(direction, grad)
        return sharded_like(direction.reshape(param.shape).to(param.dtype), param)

    def _due(self, every: int) -> bool:
        """Whether something is done in this step; the preset counts from 1."""
        return (self._completed + (self._preset is not None)) % every == 0

    def _beginning(self, blocks: list[Tensor]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """The preset's first moments, εI, and roots, I."""
        eyes = [[torch.eye(size, dtype=block.dtype, device=block.device) for size in block.shape] for block in blocks]
        return [[eye * self._epsilon for eye in block] for block in eyes], eyes

    def _stepped(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._preset is None or not group["nesterov"] or group["rule"] != "sgd":
            return group
        momentum, rate = group["momentum"], 1 + group["momentum"]
        decay = group["weight_decay"] / rate if group["decoupled_weight_decay"] else group["weight_decay"]
        changed = {"momentum": momentum**2, "nesterov": False, "lr": group["lr"] * rate, "weight_decay": decay}
        return {**group, **changed}

    def _updated(self, old: list[list[Tensor]] | None, blocks: list[Tensor]) -> list[list[Tensor]]:
        good = torch.stack([block.isfinite().all() for block in blocks]).all()
        new = [[unfolded_moment(block, axis) for axis in range(block.dim())] for block in blocks]
        if old is None:
            return [[torch.where(good, moment, 0.0) for moment in moments] for moments in new]
        share = 1.0 if self._decay == 1 else 1 - self._decay
        return [
            [torch.where(good, self._decay * b + share * n, b) for b, n in zip(*pair, strict=True)]
            for pair in zip(old, new, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state and, under "preconditioner", moments and roots by number of the parameter."""
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors go to the device of their parameter.

        Raises ValueError if the state was saved by another method, or for parameters of other shapes or blocks.
        """
        super().load_state_dict(state_dict)

    def _own_state(self) -> dict[str, Any]:
        numbers = {param: number for number, param in enumerate(self._parameters())}
        own: dict[str, Any] = {"method": type(self).__name__, "completed": self._completed}
        for name, table in (("moments", self._moments), ("roots", self._roots)):
            own[name] = {numbers[param]: [list(block) for block in blocks] for param, blocks in table.items()}
        return {"preconditioner": own}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        own, params = checked_state(state, type(self).__name__), self._parameters()
        check_form(own, dict.fromkeys(("moments", "roots"), Table(COUNT, [[Tensor]])), "preconditioner")
        everything = [*own["moments"].items(), *own["roots"].items()]
        if own["moments"].keys() != own["roots"].keys():
            raise ValueError(f"the state has moments and roots of different parameters. {REMEDY}")
        for number, blocks in everything:
            shape = self._shape(params[number]) if number < len(params) else ()
            sizes = [[tuple(moment.shape) for moment in block] for block in blocks]
            expected = [[(s.stop - s.start,) * 2 for s in where] for where in block_slices(shape, self._block)]
            if sizes != expected:
                raise ValueError(
                    f"the state's moments of parameter {number} do not fit its shape {list(shape)} and "
                    f"block={self._block}. Construct the optimiser as the saved one was."
                )
        check_state(state, self.param_groups, self.defaults)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        own, params = state["preconditioner"], self._parameters()
        self._completed = own["completed"]
        self._moments, self._roots = (
            {
                params[number]: [[m.to(params[number].device, copy=True) for m in block] for block in blocks]
                for number, blocks in own[name].items()
            }
            for name in ("moments", "roots")
        )

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def _moved(states: list[list[Tensor]], like: Tensor) -> list[list[Tensor]]:
    """The states where the gradient is now, and in its precision: parameters are moved and cast."""
    if states[0][0].dtype == like.dtype and states[0][0].device == like.device:
        return states
    return [[state.to(like) for state in block] for block in states]
