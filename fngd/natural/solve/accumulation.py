"""One Gram matrix over all backward passes of a step: accumulate="joint".

The gradient of a step is to be the direction d of the joined batch, but no backward pass knows whether it is
the last. So each pass k solves for the samples of passes 1 … k and contributes d_{1…k} − d_{1…k−1}: what is in
`.grad` after any pass is the direction of all samples so far, and DDP, GradScaler and clipping find it where they
look. It costs n(n + 1)/2 times the weighted sums of one micro-batch, x and z of all passes in memory until the
step, and one more gradient per layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fngd.natural.solve.directions import Pair, combined
from persample import LayerGrads
from persample.reweighting import Reweighting


class Passes:
    """What the backward passes since the last step have left, by key: a layer's path or the whole network."""

    def __init__(self) -> None:
        self._tensors: dict[str, list[Tensor]] = {}  # x and z of every use, joined so far
        self._versions: dict[str, list[int]] = {}
        self.sizes: dict[str, list[int]] = {}
        self._vectors: dict[str, Tensor] = {}
        self._given: dict[str, Pair] = {}
        self._plain: dict[str, Pair] = {}

    def joined(self, key: str, batch: int, handle: Reweighting) -> dict[str, LayerGrads]:
        """Returns the gradients of all passes' samples, this one's last; while a policy runs.

        Raises ValueError if a layer was used another number of times, or met other shapes, than in an earlier pass.
        """
        before, versions = self._tensors.get(key), self._versions.get(key, [])
        if before is not None and [tensor._version for tensor in before] != versions:
            raise ValueError(
                f"the inputs of '{key}' in an earlier backward pass were changed in place before the step, but "
                "accumulate='joint' needs them until then. Give the model a new tensor for every micro-batch"
            )
        taken: list[Tensor] = []

        def gather(tensor: Tensor, axis: int) -> Tensor:
            number = len(taken)
            if before is not None:
                if number == len(before):
                    raise _other_uses(key, "more")
                tensor = _cat(key, before[number], tensor, axis)
            taken.append(tensor)
            return tensor

        grads = handle.joined(gather)
        if before is not None and len(taken) < len(before):
            raise _other_uses(key, "less")
        self._tensors[key], self._versions[key] = taken, [tensor._version for tensor in taken]
        self.sizes.setdefault(key, []).append(batch)
        return grads

    def vector(self, key: str, values: Tensor) -> Tensor:
        """Returns numbers per sample of all passes, these last."""
        before = self._vectors.get(key)
        self._vectors[key] = values if before is None else torch.cat([before, values])
        return self._vectors[key]

    def plain(self, path: str, gradient: Pair) -> Pair:
        """Returns the sum of a layer's plain gradients of all passes."""
        before = self._plain.get(path)
        self._plain[path] = gradient if before is None else combined(before, gradient)
        return self._plain[path]

    def difference(self, path: str, direction: Pair) -> Pair:
        """Returns what this pass has to add so that all passes together add up to `direction`."""
        before = self._given.get(path)
        self._given[path] = direction
        return direction if before is None else combined(direction, before, -1.0)

    def clear(self) -> None:
        """Forgets everything: a step was made."""
        self.__init__()  # type: ignore[misc]


def joined_gradients(
    passes: Passes, key: str, batch: int, grads: Mapping[str, LayerGrads], handle: Reweighting
) -> dict[str, LayerGrads]:
    """Returns what `passes.joined` returns, of the layers of `grads`."""
    return {path: each for path, each in passes.joined(key, batch, handle).items() if path in grads}


def _other_uses(key: str, how: str) -> ValueError:
    return ValueError(
        f"'{key}' was used {how} often in this backward pass than in an earlier one of the same step; "
        "accumulate='joint' needs the same uses in each. Use accumulate='separate'"
    )


def _cat(key: str, before: Tensor, tensor: Tensor, axis: int) -> Tensor:
    first, second = list(before.shape), list(tensor.shape)
    first[axis] = second[axis] = 0
    if first != second:
        raise ValueError(
            f"'{key}' met tensors of shape {list(before.shape)} and {list(tensor.shape)} in two backward passes of one "
            f"step; accumulate='joint' joins them along axis {axis}, so the others must agree. Pad all micro-batches "
            "of a step to one length, or use accumulate='separate'"
        )
    return torch.cat([before, tensor.to(before.dtype)], axis)
