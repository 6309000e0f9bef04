"""Other libraries for per-sample gradients, called as their documentation says, for comparison only.

Each adapter gets a case that was built for it alone and returns what the library offers: gradients, norms of each
parameter's gradient, or one Gram matrix. Whatever a library leaves behind goes with the model.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from persample.testing.cases import call

Built = tuple[nn.Module, Callable[[Any, Any], Tensor], Any, Any]


@dataclass(frozen=True)
class Peer:
    """A library, or one of its ways."""

    name: str
    package: str
    """As pip knows it."""
    module: str
    """As Python imports it."""
    offers: str
    """What `run` returns: "grads" and "norms" by parameter (those it has), or "gram" in total."""
    run: Callable[[Built, int], Any]
    """From a built case and the batch size."""

    @property
    def installed(self) -> bool:
        """Whether the library is there."""
        return find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """The library's version."""
        return importlib.metadata.version(self.package)


PEERS: dict[str, Peer] = {}


def peer(name: str, *, package: str, module: str | None = None, offers: str = "grads") -> Callable[[Any], Any]:
    """Registers an adapter."""

    def add(function: Callable[[Built, int], Any]) -> Callable[[Built, int], Any]:
        PEERS[name] = Peer(name, package, module or package, offers, function)
        return function

    return add


def _attributes(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    """The attribute of every trainable parameter that has it."""
    found = {n: getattr(p, name, None) for n, p in model.named_parameters() if p.requires_grad}
    return {n: value.detach() for n, value in found.items() if isinstance(value, Tensor)}


def _summed_backward(run: Callable[..., Any], built: Built) -> None:
    _, loss_fn, inputs, targets = built
    losses = loss_fn(call(run, inputs), targets)
    losses.sum().backward()


@peer("Opacus hooks", package="opacus")
def opacus_hooks(built: Built, batch: int) -> Any:
    """GradSampleModule."""
    from opacus.grad_sample import GradSampleModule

    _summed_backward(GradSampleModule(built[0], loss_reduction="sum"), built)
    return _attributes(built[0], "grad_sample")


@peer("Opacus ghost", package="opacus", offers="norms")
def opacus_ghost(built: Built, batch: int) -> Any:
    """GradSampleModuleFastGradientClipping: norms alone."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(built[0], loss_reduction="sum", use_ghost_clipping=True)
    _summed_backward(wrapped, built)
    return _attributes(built[0], "_norm_sample")


@peer("ExpandedWeights", package="torch")
def expanded_weights(built: Built, batch: int) -> Any:
    """torch.nn.utils' own."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    _summed_backward(call_for_per_sample_grads(built[0], batch_size=batch, loss_reduction="sum"), built)
    return _attributes(built[0], "grad_sample")


@peer("torch.func", package="torch")
def vmap_of_grad(built: Built, batch: int) -> Any:
    """vmap of grad of functional_call, the batch on axis 0 of every tensor: torch's tutorial."""
    model, loss_fn, inputs, targets = built
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Any, target: Any) -> Tensor:
        x, target = tree_map(lambda tensor: tensor.unsqueeze(0), (x, target))
        state = {**fixed, **dict(model.named_buffers()), **parameters}
        outputs = call(lambda *args, **kwargs: functional_call(model, state, args, kwargs), x)
        return loss_fn(outputs, target).sum()

    return vmap(grad(loss), in_dims=(None, 0, 0))(trained, inputs, targets)


@peer("BackPACK", package="backpack-for-pytorch", module="backpack")
def backpack_batch_grad(built: Built, batch: int) -> Any:
    """BatchGrad."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, loss_fn, inputs, targets = built
    extend(model)
    losses = loss_fn(call(model, inputs), targets)
    with backpack(BatchGrad()):
        losses.sum().backward()
    return _attributes(model, "grad_batch")


@peer("TorchJD", package="torchjd", offers="gram")
def torchjd_gramian(built: Built, batch: int) -> Any:
    """autogram's Engine: the Gram matrix over all parameters."""
    from torchjd.autogram import Engine

    model, loss_fn, inputs, targets = built
    engine = Engine(model, batch_dim=0)
    losses = loss_fn(call(model, inputs), targets)
    return torch.as_tensor(engine.compute_gramian(losses))
