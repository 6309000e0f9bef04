"""Matrix products that decide the cost of many reductions: rows with rows, and the weight gradient.

In float32 on a CPU they go to oneDNN, which uses the widest vectors of any CPU, where the BLAS of torch's build
does so on one vendor's only: measured on an AMD EPYC with AVX-512, 230 against 105 GFLOP/s on one core, and the
weight gradient in 0.5 to 0.7 of the time, two transposes included. The choice depends on shapes alone, so that
results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Not a public operation, so it may be missing; `@` is then as exact, only slower.
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

LONGEST = 2**17
"""Entries that one product may add up: oneDNN adds one after the other, and 2^21 squares in float32 came out 1e-5
off (and five times as slow). Longer rows are to be cut and the products added."""
SMALLEST = 2**21
"""Multiplications below which a call to oneDNN costs more than it saves."""
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
    if _by_onednn(rows, columns):
        # contiguous, or it falls back to a reference kernel that is a thousand times slower
        result: Tensor = _LINEAR(rows.contiguous(), columns.contiguous(), None, "none", [], "")
        return result
    return rows @ columns.mT


def weight_product(z: Float[Tensor, "rows out"], x: Float[Tensor, "rows inp"]) -> Float[Tensor, "out inp"]:
    """Returns Σ_r z_r ⊗ x_r, [O, I]: the weight gradient of a linear layer."""
    return row_products(z.mT, x.mT)


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
