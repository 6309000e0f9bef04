"""Matrix products: g_b = Σ_t z_bt ⊗ x_bt."""

from __future__ import annotations

from torch import Tensor

from persample.blocks.types import Block, Dense, Outer
from persample.rules import Site, rule
from persample.rules.elementwise import summed


def product(site: Site, other: Tensor, slot: int, alpha: float | int = 1) -> Block | None:
    """The block of one factor of left [R, I] @ right [I, O] = output [R, O], the `other` factor given.

    Slot 0 is left, 1 right. A factor sums over one axis of the output; samples must lie along that axis, else the
    factor's own rows belong to samples and the generic rule is right.
    """
    summed_axis = 0 if slot == 1 else 1
    if site.owner.axis != summed_axis or site.z.is_complex():
        return None
    other = other.to_dense()  # a sparse input has no axis of its own for each sample
    x = site.owner.by_sample(other if slot == 1 else other.T, axis=0)  # [B, T, I]
    z = site.owner.by_sample(site.z if slot == 1 else site.z.T, axis=0)
    if alpha != 1:
        z = z * alpha
    return Outer(x=z, z=x) if slot == 1 else Outer(x=x, z=z)


@rule("AddmmBackward0")
def addmm(site: Site) -> Block | None:
    """beta · bias + alpha · mat1 @ mat2."""
    if site.slot == 0:
        return summed(site, site.z if site.saved("beta") == 1 else site.z * site.saved("beta"))
    other = site.saved("mat1") if site.slot == 2 else site.saved("mat2")
    return product(site, other, site.slot - 1, site.saved("alpha"))


@rule("MmBackward0")
def mm(site: Site) -> Block | None:
    """self @ mat2."""
    other = site.saved("self") if site.slot == 1 else site.saved("mat2")
    return product(site, other, site.slot)


@rule("BmmBackward0")
def bmm(site: Site) -> Block | None:
    """self [N, R, I] @ mat2 [N, I, O], samples along the rows: one weight for each of the N (grouped experts)."""
    if site.slot != 1 or site.owner.axis != 1 or site.z.is_complex():
        return None
    x = site.owner.by_sample(site.saved("self"))  # [B, T, N, I]
    z = site.owner.by_sample(site.z)
    return Dense(x.permute(0, 2, 3, 1) @ z.permute(0, 2, 1, 3))
