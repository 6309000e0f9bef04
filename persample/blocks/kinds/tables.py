"""Inner products of tables of which few rows are touched, g_b = Σ_t e_i(t) ⊗ z_bt, without a table.

    of a sample             ‖g_b‖² = Σ_v ‖r_bv‖²,  r_bv = Σ_(t: i_bt = v) z_bt              v by v
    of a sample, two uses   ⟨g_b, h_b⟩ = Σ_(t,s) [i_bt = j_bs] z_bt·z'_bs                 each pair of positions
    Gram matrix             K_ab = Σ_v r_av·r_bv                                            v by v
    with outer products     ⟨Σ_t e_i(t) ⊗ r_t, Σ_s z_s ⊗ x_s⟩ = Σ_(t,s) z_s[i(t)] (x_s·r_t)   a tied output projection

The Gram matrix looks only at pairs of samples that touch the same row: with a vocabulary of 30,000 that is next to
none of the B² T² pairs of positions. On an accelerator, where finding them would halt the host, it takes all pairs.
Positions of one sample that touch the same row are added up first, so that nothing is lost where they cancel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persample.blocks.chunking import chunks
from persample.blocks.precision import full_precision
from persample.blocks.types import Outer, Rows


def inner(a: Rows, b: Rows) -> Float[Tensor, " batch"]:
    """Returns ⟨g_b, h_b⟩, [B]."""
    if a is b:
        return once(a).z.square().sum((1, 2))
    az, bz = full_precision(a.z), full_precision(b.z)
    parts = [
        (torch.bmm(az[s], bz[s].mT) * (a.indices[s, :, None] == b.indices[s, None, :])).sum((1, 2))
        for s in chunks(a.batch, 2 * az.shape[1] * bz.shape[1] * az.element_size())
    ]
    return torch.cat(parts) if parts else az.new_zeros(0)


def gram(a: Rows, b: Rows) -> Float[Tensor, "batch other"]:
    """Returns K_ij = ⟨g_i, h_j⟩, [B, B']; NaN for a sample that is not finite, with those too that touch other rows."""
    return _by_touched_rows(a, b) + (_nothing(a)[:, None] + _nothing(b))


def _nothing(block: Rows) -> Float[Tensor, " batch"]:
    """Zero for each sample, NaN for one that is not finite."""
    z = full_precision(block.z)
    return 0 * torch.linalg.vector_norm(z, torch.inf, (1, 2)) if z[:1].numel() else z.new_zeros(len(z))


def _by_touched_rows(a: Rows, b: Rows) -> Tensor:
    if a.device.type != "cpu":
        return by_pairs(once(a), once(b))
    if a is b:
        return by_rows(a.indices, full_precision(a.z))
    time = max(a.z.shape[1], b.z.shape[1])  # both as one batch, of which one corner is wanted
    indices = torch.cat([_longer(block.indices, time) for block in (a, b)])
    z = torch.cat([_longer(full_precision(block.z), time) for block in (a, b)])
    return by_rows(indices, z)[: a.batch, a.batch :]


def once(block: Rows) -> Rows:
    """The same rows, each table row touched at one position of a sample at most; positions that are left over are zero.

    In float32 or better. Shapes do not depend on the indices, so nothing waits for the device.
    """
    (batch, time, dim), z = block.z.shape, full_precision(block.z)
    indices, order = block.indices.sort(1)
    first = torch.ones_like(indices)
    first[:, 1:] = indices[:, 1:] != indices[:, :-1]
    place = first.cumsum(1) - 1
    into = place + torch.arange(batch, device=z.device)[:, None] * time
    z = z.gather(1, order[:, :, None].expand(-1, -1, dim)).reshape(-1, dim)
    sums = z.new_zeros(batch * time, dim).index_add_(0, into.reshape(-1), z).view(batch, time, dim)
    return Rows(torch.zeros_like(indices).scatter_(1, place, indices), sums, block.rows)


def _longer(tensor: Tensor, time: int) -> Tensor:
    """With zeros after the last position: they touch row 0, and add nothing to it."""
    missing = tensor.new_zeros(tensor.shape[0], time - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, missing], 1)


def by_rows(indices: Int[Tensor, "batch time"], z: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch batch"]:
    """Returns K from the r_bv of each row v, [n_v, D]; rows that as many samples touch, give or take half, at once."""
    (batch, _, dim), result = z.shape, z.new_zeros(z.shape[0] ** 2)
    samples = torch.arange(batch, device=z.device)[:, None]
    keys, place = torch.unique((indices * batch + samples).flatten(), return_inverse=True)  # row by row
    sums = z.new_zeros(len(keys), dim).index_add_(0, place, z.reshape(-1, dim))
    sample = keys % max(batch, 1)
    sizes = torch.unique_consecutive(keys // max(batch, 1), return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    size = 1
    while size < 2 * batch:
        group = (sizes <= size) & (2 * sizes > size)
        first, last = starts[group], (starts + sizes)[group] - 1
        for s in chunks(len(first), size * (2 * size + dim) * z.element_size()):
            entries = first[s, None] + torch.arange(size, device=z.device)
            beyond = entries > last[s, None]
            entries = entries.clamp(max=len(keys) - 1)
            rows = sums[entries].masked_fill_(beyond[..., None], 0)
            pairs = sample[entries][:, :, None] * batch + sample[entries][:, None, :]
            result.index_add_(0, pairs.flatten(), torch.bmm(rows, rows.mT).flatten())
        size *= 2
    return result.view(batch, batch)


def by_pairs(a: Rows, b: Rows) -> Float[Tensor, "batch other"]:
    """Returns K_ij = Σ_(t,s) [i_at = j_bs] z_at·z'_bs, [B, B'], from all pairs of positions."""
    az, bz = full_precision(a.z), full_precision(b.z)
    (batch, time, _), (other, time_b) = az.shape, bz.shape[:2]
    right, index = bz.flatten(0, 1).T, b.indices.reshape(-1)
    parts = [
        ((az[s].flatten(0, 1) @ right) * (a.indices[s].reshape(-1, 1) == index))
        .view(s.stop - s.start, time, other, time_b)
        .sum((1, 3))
        for s in chunks(batch, 2 * time * other * time_b * az.element_size())
    ]
    return torch.cat(parts) if parts else az.new_zeros(0, other)


def inner_with_outer(a: Rows, b: Outer) -> Float[Tensor, " batch"]:
    """Returns ⟨g_b, h_b⟩, [B], with h outer products."""
    r, x, z = full_precision(a.z), full_precision(b.x), full_precision(b.z)
    picked = z.gather(2, a.indices[:, None, :].expand(-1, z.shape[1], -1))
    return (torch.bmm(x, r.mT) * picked).sum((1, 2))


def gram_with_outer(a: Rows, b: Outer) -> Float[Tensor, "batch other"]:
    """Returns K_ij = ⟨g_i, h_j⟩, [B, B'], with h outer products."""
    r, x, z = full_precision(a.z), full_precision(b.x), full_precision(b.z)
    (batch, time, _), (other, time_b, _) = r.shape, z.shape
    x, z = x.flatten(0, 1), z.flatten(0, 1)
    parts = [
        ((x @ r[s].flatten(0, 1).T) * z[:, a.indices[s].reshape(-1)])
        .view(other, time_b, s.stop - s.start, time)
        .sum((1, 3))
        .T
        for s in chunks(batch, 2 * time * other * time_b * r.element_size())
    ]
    return torch.cat(parts) if parts else r.new_zeros(0, other)
