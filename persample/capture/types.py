"""What is asked of a backend, a `Problem`, and what it returns, a `Capture`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from persample.blocks.types import Block
from persample.capture.foreign import explained
from persample.graph.provenance import tensors_of

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Problem:
    """What per-sample gradients are asked of."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Any
    parameters: Mapping[str, Tensor]
    """Trainable parameters by name, each once."""
    coupled: str = "error"
    check: bool = True
    randomness: str = "error"

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """Those of the model and of the loss, as far as one can see."""
        found = dict.fromkeys(self.model.modules())
        for held in self.behind_loss():
            if isinstance(held, nn.Module):
                found.update(dict.fromkeys(held.modules()))
        return tuple(found)

    @cached_property
    def attributes(self) -> list[Any]:
        """Those of modules that hold no parameters, buffers or what every module has."""
        shelves = [vars(module) for module in self.modules]
        return [shelf[name] for shelf in shelves for name in shelf.keys() - _OF_EVERY_MODULE]

    @cached_property
    def within_reach(self) -> list[Tensor]:
        """The tensors that the caller can write to at any time: data, parameters, buffers, attributes of modules."""
        held = [each for m in self.modules for shelf in (m._parameters, m._buffers) for each in shelf.values()]
        held += [*self.attributes, *self.behind_loss()]
        return [*tensors_of((self.inputs, self.targets)), *(each for each in held if isinstance(each, Tensor))]

    def behind_loss(self) -> Iterator[object]:
        """The loss function and what it is a method of, or has around itself."""
        yield self.loss_fn
        yield getattr(self.loss_fn, "__self__", None)
        for cell in getattr(self.loss_fn, "__closure__", None) or ():
            try:
                yield cell.cell_contents
            except ValueError:  # empty
                continue

    def losses(self) -> Any:
        """What the loss function returns for the model's outputs.

        Raises:
            TypeError: the model, or the loss function, does not take data that are no tensors.
        """
        with explained("inputs", self.inputs, "the model"):
            outputs = self.outputs()
        with explained("targets", self.targets, "loss_fn"):
            return self.loss_fn(outputs, self.targets)

    def outputs(self) -> Any:
        """The model called on the inputs: a tuple as positional, a dict as keyword arguments."""
        model = alone(self.model, self.inputs)
        if isinstance(self.inputs, dict):
            return model(**self.inputs)
        if isinstance(self.inputs, (tuple, list)):
            return model(*self.inputs)
        return model(self.inputs)


def alone(model: nn.Module, inputs: Any) -> nn.Module:
    """The model inside `DistributedDataParallel`, which waits for the other processes' buffers in every pass.

    How many passes a capture takes is not the same in all of them. It stays where it has to move inputs to its device,
    as does `DataParallel`, which without a device does nothing.
    """
    if isinstance(model, nn.DataParallel) and not model.device_ids:
        return model.module
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    there = {parameter.device for parameter in model.parameters()}
    tensors = [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]
    return model.module if all(each.device in there for each in tensors) else model


@dataclass(frozen=True)
class Captured:
    """One use of a parameter: its block, the operation it is used by and the rule that built the block."""

    block: Block
    operation: str
    rule: str


@dataclass(frozen=True)
class Capture:
    """What a backend returns: the losses [B] and every use of every parameter; no use: unused."""

    losses: Tensor
    uses: Mapping[str, tuple[Captured, ...]]
    notes: tuple[str, ...] = field(default=())

    @property
    def blocks(self) -> dict[str, list[Block]]:
        """Blocks alone, by parameter."""
        return {name: [use.block for use in uses] for name, uses in self.uses.items()}
