"""Linear maps from one parameter's gradient to k features: by entries, or by factors.

    Signs       feature j = 1/√k Σ_i s_ji g_i, signs s_ji                       k numbers an entry
    Sparse      each entry goes to a few features, with a sign: a count sketch   a few
    Chosen      feature j = w_j g_(i_j)                                          entries that are looked at
    Factors     P_o g P_iᵀ of a matrix g: (P_o ⊗ P_i) g, P_o and P_i of signs     less than one

Random numbers are those of `persample.projections.hashing`: functions of a key and a place.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persample.blocks.chunking import chunks, consumed_budget
from persample.blocks.precision import full_precision
from persample.blocks.types import Outer
from persample.projections.hashing import below, hashed, key_of, signs

Features = Float[Tensor, "some features"]


class ByEntries:
    """A map that is known entry by entry; complex entries are two real ones."""

    k: int

    def rows(self, rows: Float[Tensor, "some entries"], start: int) -> Features:
        """What entries `start` and the following ones add to the features."""
        raise NotImplementedError(f"{type(self).__name__} defines rows")

    def picked(self, entries: Int[Tensor, "some picked"], values: Float[Tensor, "some picked"]) -> Features:
        """What some entries of each sample add to its features; an entry may come several times."""
        raise NotImplementedError(f"{type(self).__name__} defines picked")

    def outer(self, block: Outer) -> Features | None:
        """Features without rows; None where rows are as good."""
        return None


@dataclass(frozen=True)
class Signs(ByEntries):
    """A dense matrix of ±1/√k."""

    k: int
    key: int

    def rows(self, rows: Tensor, start: int) -> Tensor:
        found = rows.new_zeros(len(rows), self.k)
        for s in chunks(rows.shape[1], 2 * 8 * self.k, consumed_budget(rows.device)):  # signs begin as 64-bit integers
            places = torch.arange(start + s.start, start + s.stop, device=rows.device)
            found += rows[:, s] @ signs(self.key, self.k, places, rows.dtype)
        return found / self.k**0.5

    def picked(self, entries: Tensor, values: Tensor) -> Tensor:
        found = values.new_zeros(len(values), self.k)
        for s in chunks(entries.shape[1], 2 * 8 * self.k * max(len(values), 1)):
            found += torch.einsum("nm,nmk->nk", values[:, s], signs(self.key, self.k, entries[:, s], values.dtype))
        return found / self.k**0.5


@dataclass(frozen=True)
class Sparse(ByEntries):
    """A matrix with few entries ±1/√nonzeros in each column."""

    k: int
    key: int
    nonzeros: int

    def rows(self, rows: Tensor, start: int) -> Tensor:
        found = rows.new_zeros(len(rows), self.k)
        entries = torch.arange(start, start + rows.shape[1], device=rows.device)
        for features, factors in self._places(entries, rows.dtype):
            found.index_add_(1, features, rows * factors)
        return found

    def picked(self, entries: Tensor, values: Tensor) -> Tensor:
        found = values.new_zeros(len(values), self.k)
        for features, factors in self._places(entries, values.dtype):
            found.scatter_add_(1, features, values * factors)
        return found

    def _places(self, entries: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        found = []
        for copy in range(self.nonzeros):
            key = key_of(self.key, copy)
            sign = 1 - 2 * (hashed(key_of(key, "sign"), entries) & 1)
            found.append((below(key, entries, self.k), sign.to(dtype) / self.nonzeros**0.5))
        return found


@dataclass(frozen=True)
class Chosen(ByEntries):
    """Some entries, in their order, times what makes up for the others."""

    k: int
    key: int
    before: int
    """Entries of other parameters that come before those of this one."""
    numel: int
    total: int
    """Entries of all parameters that share the features."""

    def rows(self, rows: Tensor, start: int) -> Tensor:
        features, entries, factors = self._chosen(rows, start, start + rows.shape[1])
        found = rows.new_zeros(len(rows), self.k)
        found[:, features] = rows[:, entries - start] * factors
        return found

    def picked(self, entries: Tensor, values: Tensor) -> Tensor:
        features, chosen, factors = self._chosen(values)
        found = values.new_zeros(len(values), self.k)
        if not len(chosen):
            return found
        nearest = torch.searchsorted(chosen, entries.contiguous()).clamp(max=len(chosen) - 1)
        hit = chosen[nearest] == entries
        return found.scatter_add_(1, features[nearest], values * factors[nearest] * hit)

    def outer(self, block: Outer) -> Tensor:
        x, z = full_precision(block.x), full_precision(block.z)
        features, entries, factors = self._chosen(z)
        width, found = x.shape[2], z.new_zeros(block.batch, self.k)
        for s in chunks(len(entries), 2 * z[..., :1].numel() * z.element_size()):
            o, i = entries[s].div(width, rounding_mode="floor"), entries[s] % width
            found[:, features[s]] = (z[:, :, o] * x[:, :, i]).sum(1) * factors[s]
        return found

    def _chosen(self, like: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features, entries and factors of a part of this parameter: of each of k parts of all entries one is chosen.

        Found on the CPU, so that nothing waits for a device.
        """
        features = torch.arange(self.k)
        first, end = (self.total * each // self.k for each in (features, features + 1))
        entries = first + below(self.key, features, end - first) - self.before
        mine = (entries >= start) & (entries < (self.numel if stop is None else stop))
        factors = (end - first)[mine].to(like.dtype).sqrt()
        return features[mine].to(like.device), entries[mine].to(like.device), factors.to(like.device)


@dataclass(frozen=True)
class Factors:
    """P_o ⊗ P_i on the gradient as a matrix [O, I], its first axis times all others."""

    shape: tuple[int, ...]
    inp: int
    out: int
    key: int

    @property
    def k(self) -> int:
        """Number of features."""
        return self.inp * self.out

    def left(self, rows: Int[Tensor, " *some"], dtype: torch.dtype) -> Float[Tensor, "*some out"]:
        """P_oᵀ at some rows of the matrix."""
        return signs(key_of(self.key, "out"), self.out, rows, dtype) / self.out**0.5

    def right(self, like: Tensor) -> Float[Tensor, "columns inp"]:
        """P_iᵀ, of the precision and on the device of a tensor."""
        columns = torch.arange(prod(self.shape[1:]), device=like.device)
        return signs(key_of(self.key, "inp"), self.inp, columns, like.dtype) / self.inp**0.5


Map = ByEntries | Factors
