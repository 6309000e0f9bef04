"""Running a model for its losses: watched where somebody may ask what its operations have read, or not.

`persample.provenance` looks at every operation of a forward pass, and takes longer than a small one does. It is asked
of graphs that no plan knows (`persample.plans`). So once a batch has followed a plan, the next ones run unwatched; one
whose graph turns out to be new runs again, watched and from the same random numbers, and its first run counts for
nothing. A model does that `MISSES` times at most, and never where a second run would meet what the first one left:
inputs, parameters or buffers changed in place; nor off the CPU, whose random numbers alone are replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from persample.backends import Problem
from persample.provenance import Provenance, tensors_of

MISSES = 2


@dataclass
class Trust:
    """Whether the next forward pass of a model may run unwatched."""

    familiar: bool = False
    misses: int = 0

    def missed(self) -> None:
        """A batch that ran unwatched had a new graph."""
        self.familiar, self.misses = False, self.misses + 1


def losses_of(problem: Problem) -> Any:
    """Runs the model; returns the losses."""
    # inference mode is left as well: its tensors can be inputs, but no operation on them would be recorded
    with torch.inference_mode(False), torch.enable_grad():
        return problem.loss_fn(problem.outputs(), problem.targets)


def watched_losses_of(problem: Problem) -> tuple[Any, Provenance]:
    """Runs the model; returns the losses and what saw the data."""
    provenance = Provenance(problem.model)
    provenance.follow(problem.inputs)
    provenance.follow_targets(problem.targets)
    with torch.inference_mode(False), provenance.named(problem.model), provenance:
        return losses_of(problem), provenance


@contextmanager
def traces(problem: Problem) -> Iterator[list[Tensor]]:
    """Yields a list that at the end holds what has been changed in place within the context."""
    tensors = [
        *tensors_of((problem.inputs, problem.targets)),
        *chain(problem.model.parameters(), problem.model.buffers()),
    ]
    before = [(each, each._version) for each in tensors if not is_lazy(each) and not each.is_inference()]
    changed: list[Tensor] = []
    yield changed
    changed += [each for each, version in before if each._version != version]


def replayable(problem: Problem) -> bool:
    """Whether the random numbers of a run are those of the CPU."""
    return all(each.device.type == "cpu" for each in problem.model.parameters())
