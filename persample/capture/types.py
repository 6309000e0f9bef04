"""What is asked of a backend, a `Problem`, and what it returns, a `Capture`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from persample.blocks.types import Block
from persample.capture.foreign import explained


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
