"""NGD(history=R): curvature of samples of the last steps, so that a step leaves the span of its own batch's gradients.

V     own gradients of the kept samples as columns: of the last R sub-batches, of this step's too, where it keeps one
N     how many they are
g     gradient of this batch

    d = (λI + VVᵀ/N)⁻¹ g = (1/λ)[g − V (λN·I + VᵀV)⁻¹ Vᵀg],    λ = α‖VᵀV‖_F

A sub-batch are the first `curvature_samples` samples of a batch (Ren and Goldfarb 2019 have R = 1), kept as x and z in
every `curvature_every`-th step. With R = 1, all samples and every step V is U, and d the direction of `NGD` without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fngd.natural.diagnostics import Solve
from fngd.natural.solve.directions import Pair, curved
from fngd.natural.solve.method import Method
from fngd.optim.state.forms import COUNT, Table, check_form
from persample import LayerGrads
from persample.reweighting import Reweighting

FORM = {"steps": COUNT, "kept": Table(str, [{"tensors": [Tensor], "own": Tensor}])}


@dataclass(frozen=True)
class SubBatch:
    """Samples of one backward pass: x and z of every use, and by what its z make own gradients, one for each sample."""

    tensors: list[Tensor]
    own: Tensor


class History:
    """The kept sub-batches by key, a layer's path or the whole network.

    Arguments:
        length: R ≥ 1.
        samples: of a batch that are kept; None: all.
        every: steps from one that keeps samples to the next.
    """

    def __init__(self, method: Method, length: int, samples: int | None, every: int) -> None:
        self._method, self._length, self._samples, self._every = method, length, samples, every
        self._steps = 0
        self._kept: dict[str, list[SubBatch]] = {}
        self._new: dict[str, SubBatch] = {}  # of the step that has not ended
        self._joined: dict[str, tuple[dict[str, LayerGrads], Tensor, Tensor]] = {}  # V, own, VᵀV, as long as they hold

    def commit(self) -> None:
        """Ends a step: what it has kept stays."""
        for key, new in self._new.items():
            self._kept[key] = [*self._kept.get(key, []), new][-self._length :]
        self._new.clear()
        self._steps += 1

    def forget(self) -> None:
        """The passes since the last step were thrown away, or it has ended."""
        for key in self._new:
            self._joined.pop(key, None)
        self._new.clear()

    def directions(
        self,
        key: str,
        batch: int,
        grads: Mapping[str, LayerGrads],
        handle: Reweighting,
        *,
        loss_scale: Tensor | None,
        alpha: float | None,
        damping: float | None,
    ) -> tuple[dict[str, tuple[Pair, Pair]], Solve]:
        """Returns (d, g) of each layer, and what is known of VᵀV; while a policy runs."""
        due = self._steps % self._every == 0 or key not in self._kept
        if key not in self._new and due:
            own = float(batch) if self._method.reduction == "mean" else 1.0
            self._keep(key, batch, own, loss_scale, grads, handle)
        elif key not in self._joined or not set(grads) <= set(self._joined[key][0]):
            self._join(key, grads, handle, None)
        samples, own_scale, gram = self._joined[key]
        samples = {path: samples[path] for path in grads}
        plain = {path: each.weighted_sum(torch.ones(batch, device=each.device)) for path, each in grads.items()}
        pairs = curved(
            plain, samples, own_scale, gram, scale=self._method.solved_scale, alpha=alpha, damping=damping
        )  # fmt: skip
        return pairs, Solve(gram, alpha, damping)

    def _keep(
        self,
        key: str,
        batch: int,
        own: float,
        loss_scale: Tensor | None,
        grads: Mapping[str, LayerGrads],
        handle: Reweighting,
    ) -> None:
        """Takes the first samples of the pass that runs."""
        first = next(iter(grads.values()))
        count = min(batch, batch if self._samples is None else self._samples)
        factor = torch.full((count,), own, device=first.device)
        new = SubBatch([], factor if loss_scale is None else factor / loss_scale)
        self._new[key] = new
        self._join(key, grads, handle, new)

    def _join(self, key: str, grads: Mapping[str, LayerGrads], handle: Reweighting, filling: SubBatch | None) -> None:
        """Puts the kept samples together; `filling`: the sub-batch that takes its own from the pass that runs."""
        before = self._kept.get(key, [])[-self._length + 1 :] if self._length > 1 else []
        if key not in self._new:
            before = self._kept[key]
        elif filling is None:
            before = [*before, self._new[key]]
        met = 0

        def gather(tensor: Tensor, axis: int) -> Tensor:
            nonlocal met
            parts = [_of(sub, met, key) for sub in before]
            if filling is not None:
                own = tensor.detach().narrow(axis, 0, len(filling.own))
                # Samples that are not finite count as ones whose gradients are zero.
                filling.tensors.append(torch.where(own.isfinite().all(), own, 0.0))
                parts.append(filling.tensors[-1])
            met += 1
            return _cat(key, parts, tensor, axis)

        joined = {path: each for path, each in handle.joined(gather).items() if path in grads}
        own = torch.cat([sub.own for sub in before] + ([] if filling is None else [filling.own]))
        one, *others = (each.gram() for each in joined.values())
        gram = sum(others, one)
        own = own.to(gram.device)
        self._joined[key] = joined, own, gram * (own[:, None] * own).to(gram.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Returns what resuming needs."""
        kept = {
            key: [{"tensors": list(sub.tensors), "own": sub.own} for sub in subs] for key, subs in self._kept.items()
        }
        return {"steps": self._steps, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` has returned."""
        self._steps = state["steps"]
        self._kept = {
            key: [
                SubBatch([each.to(device, copy=True) for each in sub["tensors"]], sub["own"].to(device, copy=True))
                for sub in subs
            ]
            for key, subs in state["kept"].items()
        }
        self._new.clear()
        self._joined.clear()


def check_history(state: Mapping[str, Any]) -> None:
    """Raises ValueError where a state of an optimiser with history has none, or not of this form."""
    if "history" not in state:
        raise ValueError(
            "the state has no 'history': it was saved by an optimiser without history= and curvature_samples=. "
            "Construct the optimiser as the saved one was"
        )
    check_form(state["history"], FORM, "history")


def _of(sub: SubBatch, number: int, key: str) -> Tensor:
    if number >= len(sub.tensors):
        raise ValueError(
            f"'{key}' was used more often in this backward pass than when samples were kept, but history= needs the "
            "same uses in each step"
        )
    return sub.tensors[number]


def _cat(key: str, parts: list[Tensor], like: Tensor, axis: int) -> Tensor:
    shapes = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"'{key}' met tensors of shapes {[list(part.shape) for part in parts]} in several steps; history= joins "
            f"them along axis {axis}, so the others must agree. Pad all batches to one length"
        )
    return torch.cat([part.to(like) for part in parts], axis)
