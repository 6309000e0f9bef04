"""Reductions over a batch too large for memory: captured chunk by chunk, each chunk anew for each reduction.

Exact, because the rows of a chunk do not depend on other chunks. Memory is that of one chunk (two for a Gram
matrix) and of the result; time is one forward and backward pass over the batch for each reduction, and for a
Gram matrix of n chunks (n + 1) / 2 of them. Random numbers are replayed, so that every reduction sees the same
dropout masks. That the losses of a chunk are those of the whole batch is checked, by one forward pass without a graph:
they are not where a tensor is cut that all samples share, or where samples are padded to the longest. Where random
numbers are drawn, it takes two more, without chance (`persample.result.holding.deterministic`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.utils._pytree import tree_map

from persample import memory
from persample.attribution.coupling import several_losses
from persample.errors import CheckError, PerSampleError
from persample.graph.batch_size import batch_size
from persample.graph.provenance import tensors_of
from persample.projections import Projection
from persample.result.accumulating import accumulate
from persample.result.arguments import refuse_other
from persample.result.centred import mean_of, refuse_mean, without_mean
from persample.result.explanation import Explanation
from persample.result.grouping import Per, PerPosition, transposed
from persample.result.holding.cutting import part_of
from persample.result.holding.unchanged import Unchanged, require
from persample.result.holding.whole import Whole
from persample.result.per_sample_grads import PerSampleGrads

Captured = Callable[[Any, Any], PerSampleGrads]
PerName = dict[str, Tensor]


INSTEAD = "Or leave chunk_size out: hold='graph' saves memory too, and does not cut the batch"


class ChunkedPerSampleGrads:
    """Per-sample gradients of one batch in chunks; the methods are those of `PerSampleGrads`."""

    def __init__(
        self,
        capture: Captured,
        inputs: Any,
        targets: Any,
        chunk_size: int,
        batch: int,
        state: Sequence[Tensor],
        whole: Whole | None = None,
        *,
        several: bool = False,
        random: dict[int, tuple[Tensor, list[Tensor]]] | None = None,
    ) -> None:
        """`several`: samples have several losses each, neighbours: B is the number of losses, chunks are of samples.
        `random`: random numbers of each chunk, those of an earlier one of these."""
        if whole is not None and (len(whole.losses) % max(batch, 1) if several else len(whole.losses) != batch):
            raise ValueError(
                f"chunk_size cuts along dimension 0, which of the first tensor of the inputs has {batch} entries; but "
                f"there are {len(whole.losses)} samples, by the losses{_remedy(batch, len(whole.losses))}"
            )
        self._samples, self._each = batch, None if several else 1
        self._whole = whole
        self._capture = capture
        self._data, self._state = (inputs, targets), state
        self._slices = [slice(i, min(i + chunk_size, batch)) for i in range(0, batch, chunk_size)]
        self._random = {} if random is None else random
        self._losses: dict[int, Tensor] = {}
        self._read_again: Unchanged | None = None
        self._parts_unchanged = [Unchanged(_strided(self._part(i))) for i in range(len(self._slices))]
        self._data_unchanged = Unchanged(_others(self._data), tensors_of(self._data))
        first = self._chunk(0)  # what cannot be captured is refused here, not at the first reduction
        self.backend, self.notes, self.unused, self.layers = first.backend, first.notes, first.unused, first.layers
        self._explanation, self._parameters = first.explain(), first._parameters

    @property
    def _instead(self) -> str:
        return INSTEAD if self._each == 1 else "Or leave chunk_size out"

    @property
    def batch(self) -> int:
        """Number of losses B."""
        return self._samples * (self._each or 1)

    @property
    def _parts(self) -> list[slice]:
        """The rows of each chunk."""
        each = self._each or 1
        return [slice(part.start * each, part.stop * each) for part in self._slices]

    def __repr__(self) -> str:
        return (
            f"ChunkedPerSampleGrads(batch={self.batch}, chunks={len(self._slices)} of {self._slices[0].stop}, "
            f"backend={self.backend!r})"
        )

    def __getstate__(self) -> Any:
        raise TypeError(
            "per-sample gradients with chunk_size cannot be copied, pickled or saved: they hold the model and the "
            "batch, and are formed when they are asked for. Leave chunk_size out, or keep what the reductions return"
        )

    @property
    def losses(self) -> Float[Tensor, " batch"]:
        """The losses, [B]."""
        for i in range(len(self._slices)):
            if i not in self._losses:
                self._chunk(i)
        return torch.cat([self._losses[i] for i in range(len(self._slices))])

    def grads(self, *, out: Mapping[str, Tensor] | None = None) -> dict[str, Inexact[Tensor, "batch *shape"]]:
        """See `PerSampleGrads.grads`."""
        self._check_buffers({} if out is None else out)
        result = dict(out or {})
        for i, part in enumerate(self._parts):
            psg = self._chunk(i)
            filled = {name: buffer[part] for name, buffer in result.items()}
            for name, rows in psg._rows(filled).items():
                if name not in result:
                    reused = memory.rows(psg._parameters[name], self.batch, rows.dtype)
                    result[name] = rows.new_empty(self.batch, *rows.shape[1:]) if reused is None else reused
                if name not in filled:
                    result[name][part] = rows
        return result

    def norms(self, per: PerPosition = "total") -> Float[Tensor, " batch"] | dict[str, Float[Tensor, "batch ..."]]:
        """See `PerSampleGrads.norms`."""
        return _cat([self._chunk(i).norms(per) for i in range(len(self._slices))])

    def gram(
        self,
        per: PerPosition = "total",
        other: PerSampleGrads | ChunkedPerSampleGrads | None = None,
        *,
        centred: bool = False,
    ) -> Float[Tensor, "batch other"] | dict[str, Float[Tensor, "batch other ..."]]:
        """See `PerSampleGrads.gram`; `other` may be chunked too."""
        if centred:
            alone = refuse_mean(other, per)
            return without_mean(self._gram(alone, None, None), lambda: self._gram(alone, None, self._mean()))
        if other is not None:
            refuse_other(other)
        return self._gram(per, other, None)

    def _mean(self) -> PerName:
        return mean_of(self.weighted_sum, self.losses)

    def _gram(
        self, per: Any, other: PerSampleGrads | ChunkedPerSampleGrads | None, centers: PerName | None
    ) -> Tensor | PerName:
        def product(left: PerSampleGrads, right: PerSampleGrads | None) -> Any:
            if centers is None:
                return left.gram(per, right)
            with torch.no_grad():
                return left._gram_around(per, left if right is None else right, centers)

        grid: list[list[Any]] = []
        for i in range(len(self._slices)):
            left = self._chunk(i)
            if isinstance(other, PerSampleGrads):
                grid.append([product(left, other)])
            elif other is not None:
                grid.append([product(left, other._chunk(j)) for j in range(len(other._slices))])
            else:
                grid.append([transposed(grid[j][i]) for j in range(i)])  # symmetric: only j ≥ i is captured
                later = (self._chunk(j) for j in range(i + 1, len(self._slices)))
                grid[i] += [product(left, None), *(product(left, right) for right in later)]
        return _cat([_cat(blocks, right=True) for blocks in grid])

    def _gram_around(self, per: Per, right: ChunkedPerSampleGrads, centers: PerName) -> Tensor | PerName:
        return self._gram(per, None, centers)

    def weighted_sum(self, c: Tensor | Mapping[str, Tensor]) -> dict[str, Inexact[Tensor, " *shape"]]:
        """See `PerSampleGrads.weighted_sum`."""
        for layer, values in c.items() if isinstance(c, Mapping) else [("all", c)]:
            if not isinstance(values, Tensor) or tuple(values.shape) != (self.batch,):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"c must be a tensor of shape [B] = [{self.batch}] (layer {layer!r}); got {got}")
        parts = (tree_map(lambda values, part=part: values[part], c) for part in self._parts)
        return _sum(self._chunk(i).weighted_sum(part) for i, part in enumerate(parts))

    def dot(
        self, vectors: Mapping[str, Inexact[Tensor, " *shape"] | Inexact[Tensor, "k *shape"]]
    ) -> Float[Tensor, " batch"] | Float[Tensor, "batch k"]:
        """See `PerSampleGrads.dot`."""
        return torch.cat([self._chunk(i).dot(vectors) for i in range(len(self._slices))])

    def project(
        self, projection: Projection, per: Per = "total", *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "batch k"] | dict[str, Float[Tensor, "batch k"]]:
        """See `PerSampleGrads.project`."""
        return _cat([self._chunk(i).project(projection, per, dtype=dtype) for i in range(len(self._slices))])

    def sum_of_squares(self) -> dict[str, Float[Tensor, " *shape"]]:
        """See `PerSampleGrads.sum_of_squares`."""
        return _sum(self._chunk(i).sum_of_squares() for i in range(len(self._slices)))

    def variance(self) -> dict[str, Float[Tensor, " *shape"]]:
        """See `PerSampleGrads.variance`: of the chunks themselves, and of their means around that of all."""
        means: list[PerName] = []
        inside: list[PerName] = []
        shares = [(part.stop - part.start) / self.batch for part in self._slices]
        for i in range(len(self._slices)):
            psg = self._chunk(i)
            sums = psg.weighted_sum(torch.ones_like(psg.losses))
            means.append({name: value / psg.batch for name, value in sums.items()})
            inside.append(psg.variance())
        mean = _sum(_times(share, each) for share, each in zip(shares, means, strict=True))
        between = [{name: (value - mean[name]).abs().square() for name, value in each.items()} for each in means]
        return _sum(_times(share, each) for share, each in zip(shares * 2, inside + between, strict=True))

    def backward(
        self, coefficients: Tensor | Mapping[str, Tensor] | None = None, *, process_group: Any | None = None
    ) -> None:
        """See `PerSampleGrads.backward`."""
        c = torch.ones_like(self.losses) if coefficients is None else coefficients
        accumulate(self._parameters, self.weighted_sum(c), self.unused, process_group)

    def clipped_sum(self, max_norm: float | int | Mapping[str, float]) -> dict[str, Inexact[Tensor, " *shape"]]:
        """See `PerSampleGrads.clipped_sum`."""
        return _sum(self._chunk(i).clipped_sum(max_norm) for i in range(len(self._slices)))

    def _check_buffers(self, out: Mapping[str, Tensor]) -> None:
        """Raises unless each buffer is a tensor of all samples; the rest is seen when a chunk is written there."""
        if not isinstance(out, Mapping):
            raise TypeError(f"out must be a dict, parameter name -> buffer [B, *shape]; got {type(out).__name__}")
        for name, buffer in out.items():
            if not isinstance(buffer, Tensor) or buffer.ndim == 0 or len(buffer) != self.batch:
                got = tuple(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
                raise ValueError(f"out[{name!r}] must be a tensor with B = {self.batch} rows; got {got}")

    def explain(self) -> list[Explanation]:
        """See `PerSampleGrads.explain`; of the first chunk."""
        return self._explanation

    def _chunk(self, i: int) -> PerSampleGrads:
        """The capture of chunk i, with the random numbers of its first capture."""
        for data in (self._data_unchanged, self._parts_unchanged[i]):
            require(self._read_again, data, way="chunk_size")
        part, (inputs, targets) = self._slices[i], self._part(i)
        if i not in self._random:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
            self._random[i] = torch.get_rng_state(), cuda
            psg = self._captured(inputs, targets)
        else:
            with torch.random.fork_rng():
                torch.set_rng_state(self._random[i][0])
                if self._random[i][1]:
                    torch.cuda.set_rng_state_all(self._random[i][1])
                psg = self._captured(inputs, targets)
        size = part.stop - part.start
        if self._each is None:
            self._each = psg.batch // max(size, 1)
        if psg.batch != size * self._each:
            raise ValueError(
                f"a chunk of {size} samples gave {psg.batch} losses. chunk_size cuts every tensor of inputs and "
                f"targets with {self._samples} entries along dimension 0; the batch must lie there. {self._instead}"
            )
        if (
            self._whole is not None
            and not (i in self._losses and self._whole.still)
            and not self._whole.agrees(self._parts[i], psg.losses, inputs, targets)
        ):
            raise CheckError(
                f"samples {part.start} to {part.stop - 1} have other losses in a chunk of their own than in the whole "
                f"batch: chunk_size cuts every tensor of inputs and targets with {self._samples} entries along "
                "dimension 0, and one of them may hold no samples (then give it a first dimension of one), or the "
                f"model's state or padding depends on the whole batch. {self._instead}. check=False turns this "
                "check off"
            )
        self._losses[i] = psg.losses
        if self._read_again is None:
            self._read_again = Unchanged(self._state)
        else:
            self._read_again.remember()  # the model may change them itself: max_norm of an embedding
        return psg

    def _part(self, i: int) -> Any:
        """Inputs and targets of chunk i."""
        return part_of(self._data, self._slices[i], self._samples)

    def _captured(self, inputs: Any, targets: Any) -> PerSampleGrads:
        try:
            return self._capture(inputs, targets)
        except (RuntimeError, IndexError, ValueError) as error:
            if self._whole is None or isinstance(error, (PerSampleError, torch.OutOfMemoryError)):
                raise
            raise ValueError(
                f"the model runs on the whole batch and not on a part of it: {error}. chunk_size cuts every tensor of "
                f"inputs and targets with {self._samples} entries along dimension 0 alone; the batch must lie there. "
                f"{self._instead}"
            ) from error


def _remedy(entries: int, losses: int) -> str:
    several = several_losses(entries, losses)
    return f". {several}" if several else f"; the batch must lie there. {INSTEAD}"


def batch_of(inputs: Any) -> int | None:
    """The number of samples in the inputs: entries along dimension 0 of the first tensor that is not shared."""
    return batch_size((inputs,), {})


def _strided(data: Any) -> list[Tensor]:
    return [each for each in tensors_of(data) if each.layout is torch.strided]


def _others(data: Any) -> list[Tensor]:
    return [each for each in tensors_of(data) if each.layout is not torch.strided]


def _cat(parts: list[Any], *, right: bool = False) -> Any:
    """One of what was formed of chunks; of Gram matrices the `right` batch, in the middle of the axes, or the left."""
    if isinstance(parts[0], dict):
        return {name: _cat([part[name] for part in parts], right=right) for name in parts[0]}
    dim = parts[0].ndim // 2 if right else 0
    positions = {part.shape[:dim] + part.shape[dim + 1 :] for part in parts}
    if len(positions) > 1:
        raise ValueError(
            "chunks have different numbers of positions, which only some samples have: form per='position' of each "
            "chunk by itself"
        )
    return torch.cat(parts, dim)


def _sum(parts: Any) -> PerName:
    total: PerName = {}
    for part in parts:
        total = {name: total[name] + value if total else value for name, value in part.items()}
    return total


def _times(factor: float, values: PerName) -> PerName:
    return {name: factor * value for name, value in values.items()}
