"""Matrix products that decide the cost of many reductions: rows with rows, and the weight gradient.

In float32 on a CPU they go to oneDNN, which uses the widest vectors of any CPU, where the BLAS of torch's build
does so on one vendor's only: measured on an AMD EPYC with AVX-512, 230 against 105 GFLOP/s on one core, and the
weight gradient in 0.5 to 0.7 of the time, the transpose of z included. The choice depends on shapes alone, so that
results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persample.memory.workspace import scaled, transposed

# Not a public operation, so it may be missing; `@` is then as exact, only slower.
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

LONGEST = 2**17
"""Entries that one product may add up: oneDNN adds one after the other, and 2^21 squares in float32 came out 1e-5
off (and five times as slow). Longer rows are to be cut and the products added."""
SMALLEST = 2**21
"""Multiplications below which a call to oneDNN costs more than it saves."""
LARGE = 6 * 2**20
"""Multiplications above which the weight gradient of one sample is formed on its own."""
PIECE, FEWEST = 2**19, 128
"""Bytes of z that are transposed at a time for the weight gradient, and rows at least: what is transposed lies in
memory that is kept, and products of fewer rows write as much as they read. Twice as much of both takes 0.91 to 1.00 of
the time, and 0.5 MiB that stay; a Transformer's step with stored coefficients has 3 MiB more than the plain one."""
TOGETHER = 2**18
"""Bytes of the z of one sample up to which those of all samples are transposed at once."""
NARROWEST = 64
"""Rows in a block of a symmetric product, at least."""


def widest(factor: Tensor) -> bool:
    """Whether large products with this tensor go to oneDNN."""
    return _LINEAR is not None and factor.dtype == torch.float32 and factor.device.type == "cpu"


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    size = left.shape[0] * left.shape[1] * right.shape[0]
    if left.requires_grad or right.requires_grad or torch._C._are_functorch_transforms_active():
        return False  # not differentiable: where a sum is differentiated by its factors, nothing may reach it
    return widest(left) and widest(right) and left.shape[1] <= LONGEST and size >= SMALLEST


def row_products(
    rows: Float[Tensor, "batch entries"], columns: Float[Tensor, "other entries"]
) -> Float[Tensor, "batch other"]:
    """Returns rows @ columns.T, [B, B']."""
    return _onednn(rows.contiguous(), columns) if _by_onednn(rows, columns) else rows @ columns.mT


def weight_product(
    z: Float[Tensor, "rows out"], x: Float[Tensor, "rows inp"], c: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, "out inp"]:
    """Returns Σ_r c_r z_r ⊗ x_r, [O, I]: the weight gradient of a linear layer, of rows that count as c says.

    Multiplied by c is the transposed copy of z, which oneDNN needs anyway; elsewhere the narrower of z and x.
    """
    if _by_onednn(z.mT, x.mT) and not (c is not None and c.requires_grad):
        pieces = max(1, min(len(z) // FEWEST, -(-z.nbytes // PIECE)))
        factors = [None] * pieces if c is None else c.tensor_split(pieces)
        return _sum(map(_piece, z.tensor_split(pieces), x.tensor_split(pieces), factors))
    if c is not None and z.shape[1] <= x.shape[1]:
        z = scaled(z, c)
    elif c is not None:
        x = scaled(x, c)
    return z.mT @ x


def weight_products(
    z: Float[Tensor, "batch time out"], x: Float[Tensor, "batch time inp"], out: Tensor | None = None
) -> Float[Tensor, "batch out inp"]:
    """Returns Σ_t z_bt ⊗ x_bt of each sample, [B, O, I], written into `out` where it is given.

    Products that are large are formed one after the other: 8 samples of 3072 × 768 with 128 positions take 18 ms
    on two cores in place of 28, 16 of 2048 × 2048 with 4 positions 23 in place of 31.
    """
    batch, time, width = z.shape
    if batch and time * width * x.shape[2] >= LARGE and _by_onednn(z[0].mT, x[0].mT):
        out = z.new_empty(batch, width, x.shape[2]) if out is None else out
        factors = transposed(z).unbind() if z[0].nbytes <= TOGETHER else map(transposed, z.unbind())
        for z_b, x_b, g_b in zip(factors, x.unbind(), out.unbind(), strict=True):
            g_b.copy_(_onednn(z_b, x_b.mT))
        return out
    return torch.bmm(z.mT, x, out=out)


def _piece(z: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
    rows = transposed(z)
    return _onednn(rows if c is None else rows.mul_(c), x.mT)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


def _onednn(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns.T of contiguous rows.

    Columns are packed in any case, from either order; in a third one it takes a kernel a thousand times slower.
    """
    packed = columns if columns.mT.is_contiguous() else columns.contiguous()
    result: Tensor = _LINEAR(rows, packed, None, "none", [], "")
    return result


def gram_of_rows(rows: Float[Tensor, "batch entries"], columns: Float[Tensor, "other entries"] | None = None) -> Tensor:
    """Returns rows @ columns.T for rows of any length; columns default to the rows, which takes half the products."""
    if rows.shape[1] <= LONGEST:
        return _symmetric(rows) if columns is None else row_products(rows, columns)
    result = rows.new_zeros(rows.shape[0], (rows if columns is None else columns).shape[0])
    for start in range(0, rows.shape[1], LONGEST):
        part = slice(start, start + LONGEST)
        result += gram_of_rows(rows[:, part], None if columns is None else columns[:, part])
    return result


def _symmetric(rows: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch batch"]:
    """Returns rows @ rows.T from the blocks on and below the diagonal.

    Of 64 rows and more at a time, or the narrow products lose what the missing ones save: 128 rows of 36,864 entries
    take 0.82 of the time, 512 rows 0.63; 32 rows in halves would take 1.1.
    """
    batch = rows.shape[0]
    if batch < 2 * NARROWEST or batch * rows.shape[1] < SMALLEST:
        return row_products(rows, rows)
    result = rows.new_empty(batch, batch)
    step = max(NARROWEST, -(-batch // 4))
    for start in range(0, batch, step):
        end = min(start + step, batch)
        block = row_products(rows[:end], rows[start:end])
        result[:end, start:end] = block
        result[start:end, :start] = block[:start].mT
    return result
