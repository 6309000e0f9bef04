"""Running a model for its losses: watched where somebody may ask what its operations have read, or not.

`persample.graph.provenance` looks at every operation of a forward pass, and takes longer than a small one does. It is
asked of graphs that no plan knows (`persample.capture.plans`). So once a batch has followed a plan, the next ones run
unwatched; one whose graph turns out to be new runs again, watched, from the same random numbers and with the attributes
that modules had (a recurrent state that is carried from batch to batch, say), and its first run counts for nothing. A
model does that `MISSES` times at most, and never where a second run would meet what the first one left: tensors changed
in place; nor off the CPU, whose random numbers alone are replayed. That a model leaves nothing is known of the mode it
ran in: the first batch in training mode is watched, whatever others were.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from persample.capture.types import Problem
from persample.errors import UnsupportedError
from persample.graph.provenance import Provenance

MISSES = 2


@dataclass
class ReplayPolicy:
    """Whether the next forward pass of a model may run unwatched."""

    modes: set[Hashable] = field(default_factory=set)
    """In which the latest batch followed a plan and left nothing behind."""
    misses: int = 0

    def missed(self) -> None:
        """A batch that ran unwatched had a new graph."""
        self.modes.clear()
        self.misses += 1


def mode_of(problem: Problem) -> Hashable:
    """Which modules are in training mode, and how the samples are read."""
    return problem.coupled, tuple(module.training for module in problem.modules)


class ModelState:
    """What a batch meets: tensors, and the attributes of modules, to be told and put back after a run.

    Args:
        problem: about to be run.
        values: whether values of buffers are compared, as well as versions. It takes a copy: batch normalisation writes
            its statistics without raising their version.
    """

    def __init__(self, problem: Problem, *, values: bool = False) -> None:
        shelves = [vars(module) for module in problem.modules]
        shelves += [
            shelf[name] for shelf in shelves for name in ("_parameters", "_buffers") if type(shelf.get(name)) is dict
        ]
        inside = list(problem.attributes)
        for each in problem.behind_loss():
            if hasattr(each, "__dict__") and not isinstance(each, (nn.Module, type, FunctionType)):
                shelves.append(vars(each))
                inside += vars(each).values()
        containers = [each for each in inside if type(each) in (list, dict)]
        self._shelves: list[tuple[Any, Any]] = [(shelf, shelf.copy()) for shelf in (*shelves, *containers)]
        inside += [each for held in containers for each in (held.values() if isinstance(held, dict) else held)]
        tensors = [*problem.within_reach, *(each for each in inside if isinstance(each, Tensor))]
        each_once = {id(each): each for each in tensors}.values()
        self._versions = [(each, each._version) for each in each_once if not (is_lazy(each) or each.is_inference())]
        buffers = (each for module in problem.modules for each in module._buffers.values()) if values else ()
        self._values = [(each, each.clone()) for each in buffers if each is not None and not is_lazy(each)]

    def written(self) -> bool:
        """Whether a tensor has been changed in place since."""
        return any(each._version != version for each, version in self._versions) or any(
            not torch.equal(each, value) for each, value in self._values
        )

    def restore(self) -> None:
        """Puts attributes back.

        Raises:
            UnsupportedError: a tensor has been changed in place.
        """
        if self.written():
            raise UnsupportedError(
                "this batch has another graph than those before, and must be run twice to tell its samples apart; but "
                "the model (or the loss) has changed a tensor in place meanwhile, an input, a parameter or a buffer, "
                "which it did not do before. Put that tensor back if a second change is one too many, and call again: "
                "the next batch runs once"
            )
        for shelf, before in self._shelves:
            if isinstance(shelf, list):
                shelf[:] = before
            elif len(shelf) != len(before) or any(shelf.get(key, shelf) is not each for key, each in before.items()):
                for key in [key for key in shelf if key not in before]:
                    del shelf[key]
                shelf.update(before)


def losses_of(problem: Problem) -> Any:
    """Runs the model; returns the losses."""
    # inference mode is left as well: its tensors can be inputs, but no operation on them would be recorded
    with torch.inference_mode(False), torch.enable_grad():
        return problem.losses()


def watched_losses_of(problem: Problem) -> tuple[Any, Provenance]:
    """Runs the model; returns the losses and what saw the data."""
    provenance = Provenance(problem.model)
    provenance.follow(problem.inputs)
    provenance.follow_targets(problem.targets)
    with torch.inference_mode(False), provenance.named(problem.model), provenance:
        return losses_of(problem), provenance


def replayable(problem: Problem) -> bool:
    """Whether the random numbers of a run are those of the CPU."""
    return all(each.device.type == "cpu" for each in problem.model.parameters())
