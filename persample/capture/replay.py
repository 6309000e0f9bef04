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

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from persample.capture.types import Problem
from persample.errors import UnsupportedError
from persample.graph.provenance import Provenance, tensors_of

MISSES = 2
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that hold no state of the user's, but for parameters and buffers."""


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
    return problem.coupled, tuple(module.training for module in modules_of(problem))


def modules_of(problem: Problem) -> list[nn.Module]:
    """Those of the model and of the loss, as far as one can see."""
    found = dict.fromkeys(problem.model.modules())
    for held in _behind(problem.loss_fn):
        if isinstance(held, nn.Module):
            found.update(dict.fromkeys(held.modules()))
    return list(found)


def _behind(function: Callable[..., Any]) -> Iterator[object]:
    """A loss function and what it is a method of, or has around itself."""
    yield function
    yield getattr(function, "__self__", None)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty
            continue


def within_reach(problem: Problem) -> list[Tensor]:
    """The tensors that the caller can write to at any time: data, parameters, buffers, attributes of modules."""
    tensors = tensors_of((problem.inputs, problem.targets))
    for module in modules_of(problem):
        for shelf in (vars(module), module._parameters, module._buffers):
            tensors += [each for each in shelf.values() if isinstance(each, Tensor) and not is_lazy(each)]
    return [*tensors, *(each for each in _behind(problem.loss_fn) if isinstance(each, Tensor))]


class ModelState:
    """What a batch meets: tensors, and the attributes of modules, to be told and put back after a run.

    Args:
        problem: about to be run.
        values: whether values of buffers are compared, as well as versions. It takes a copy: batch normalisation writes
            its statistics without raising their version.
    """

    def __init__(self, problem: Problem, *, values: bool = False) -> None:
        modules = modules_of(problem)
        self._shelves: list[tuple[Any, Any]] = []
        tensors = tensors_of((problem.inputs, problem.targets))
        for module in modules:
            attributes = vars(module)
            self._note(attributes, tensors)
            for name in ("_parameters", "_buffers"):
                if type(attributes.get(name)) is dict and attributes[name]:
                    self._note(attributes[name], tensors)
        for each in _behind(problem.loss_fn):
            if hasattr(each, "__dict__") and not isinstance(each, (nn.Module, type, FunctionType)):
                self._note(vars(each), tensors)
        each_once = {id(each): each for each in tensors}.values()
        self._versions = [(each, each._version) for each in each_once if not (is_lazy(each) or each.is_inference())]
        buffers = (each for module in modules for each in module._buffers.values()) if values else ()
        self._values = [(each, each.clone()) for each in buffers if each is not None and not is_lazy(each)]

    def _note(self, shelf: Any, tensors: list[Tensor], *, inside: bool = True) -> None:
        """Copies attributes, and lists and dicts among them, and adds the tensors there."""
        self._shelves.append((shelf, shelf.copy()))
        for key, each in shelf.items() if isinstance(shelf, dict) else enumerate(shelf):
            if key in _OF_EVERY_MODULE:
                continue
            if isinstance(each, Tensor):
                tensors.append(each)
            elif inside and type(each) in (list, dict):
                self._note(each, tensors, inside=False)

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
