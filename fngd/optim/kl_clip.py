"""The KL clip: directions are shortened so that the step's length in the Fisher metric stays below a bound.

    ν = min(1, √(κ / Σ_l lr_l²·|⟨d_l, g_l⟩|))    (Ba, Grosse, Martens 2017, Section 5; in this form in kfac-pytorch)

d_l, g_l    direction and gradient of layer l
lr_l        its learning rate in this very step, as the scheduler has set it
κ           the bound, > 0; 1e-3 is usual
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fngd.optim.distributed import mean_over_processes, world_size


def squared_length(inner: Iterable[Tensor], rates: Iterable[Any]) -> Tensor:
    """Returns Σ_l lr_l²⟨d_l, g_l⟩, a tensor of no axes; `inner`: ⟨d_l, g_l⟩ of each layer, `rates`: lr_l."""
    return torch.stack([value * rate**2 for value, rate in zip(inner, rates, strict=True)]).sum()


def kl_clip_factor(inner: list[Tensor], rates: list[Any], kappa: float) -> Tensor:
    """Returns ν of one direction; nothing waits for the device, and ν is 1 where the sum is 0.

    >>> kl_clip_factor([torch.tensor(4.0)], [0.5], 1e-2)
    tensor(0.1000)
    """
    return (kappa / squared_length(inner, rates).abs()).sqrt().clamp(max=1.0)


def kl_clip_bound(
    passes: Iterable[list[tuple[Any, Tensor]]], kappa: float, group: Any = None, device: torch.device | None = None
) -> Tensor:
    """Returns a lower bound of ν for the sum of several directions; passes hold (lr_l, ⟨d_l, g_l⟩) of each.

    Of several backward passes and processes, whose directions are added, only their own inner products are known.
    As ⟨Σd, Σg⟩ ≤ (Σ_i √⟨d_i, g_i⟩)² where they share a metric, that bound is taken: ν is never too large, and
    exact for one pass in one process. `group`: the process group, in which a process may have no directions of its own;
    `device`: of its parameters.
    """
    lengths = [squared_length([value for _, value in layers], [rate for rate, _ in layers]) for layers in passes]
    root = torch.stack(lengths).clamp_min(0).sqrt().sum() if lengths else torch.zeros((), device=device)
    root = root.double() if world_size(group) > 1 else root  # one precision everywhere, whatever the layers have
    return (kappa**0.5 / mean_over_processes(root, group)).clamp(max=1.0)  # 0 ≤ root: x/0 = inf is clamped


def by_pass(inner: Mapping[str, list[Tensor]], rates: Mapping[str, Any]) -> list[list[tuple[Any, Tensor]]]:
    """Returns (lr_l, ⟨d_l, g_l⟩) of the layers of each backward pass; `inner`: a layer's values, one for each pass.

    >>> by_pass({"a": [torch.ones(()), torch.zeros(())], "b": [torch.ones(())]}, {"a": 0.1, "b": 0.2})
    [[(0.1, tensor(1.)), (0.2, tensor(1.))], [(0.1, tensor(0.))]]
    """
    count = max((len(values) for values in inner.values()), default=0)
    return [
        [(rates[layer], values[number]) for layer, values in inner.items() if number < len(values)]
        for number in range(count)
    ]
