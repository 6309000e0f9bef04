"""A batch whose backward pass has raised is run again: FNGD's table keeps its places. Samples that were never met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import FNGD

pytestmark = pytest.mark.usefixtures("double")
STEPS = 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, number: int) -> Tensor:
    random = torch.Generator().manual_seed(number)
    return F.cross_entropy(model(torch.randn(5, 3, generator=random)), torch.randint(2, (5,), generator=random))


def fails(*_: Any) -> None:
    raise RuntimeError("out of memory")


KINDS: dict[str, dict[str, Any]] = {
    "position": {},
    "joint": {"accumulate": "joint"},
    "network": {"gram": "network"},
    "by sample": {"share": "sample", "samples": 5 * STEPS},
    "clip": {"kl_clip": 1e-4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_batch_is_run_again_after_an_exception(kind: str, passes: int) -> None:
    """In the epoch that computes and in a later one, in the first pass or the second: as if nothing had happened."""
    tables, weights = [], []
    for disturbed in (False, True):
        model = net()
        opt = FNGD(model, lr=0.05, steps_per_epoch=STEPS, **KINDS[kind])

        def batch(number: int, model: nn.Module = model, opt: FNGD = opt) -> None:
            for part in range(passes):
                if kind == "by sample":
                    opt.next_batch(torch.arange(5) + 5 * (number % STEPS))
                (loss_of(model, 10 * (number % STEPS) + part) / passes).backward()

        for number in range(2 * STEPS):
            if disturbed and number in (1, 2, STEPS + 1):
                hook = model[1].register_full_backward_hook(fails)
                with pytest.raises(RuntimeError, match="out of memory"):
                    batch(number)
                hook.remove()
                opt.zero_grad()
            batch(number)
            opt.step()
            opt.zero_grad()
        tables.append(opt.state_dict()["coefficients"])
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.testing.assert_close(weights[1], weights[0])
    assert tables[1]["index"] == tables[0]["index"]
    torch.testing.assert_close(tables[1]["rows"], tables[0]["rows"])


def test_samples_that_were_never_met_are_not_called_reweighted() -> None:
    model = net()
    opt = FNGD(model, lr=0.05, steps_per_epoch=1, share="sample", samples=20)

    def explained(ids: Tensor) -> str:
        opt.next_batch(ids)
        loss_of(model, 0).backward()
        opt.step()
        opt.zero_grad()
        return opt.explain()["2"]

    assert explained(torch.arange(5)) == "reweighted, samples on axis 0 of its output"
    assert explained(torch.arange(5)) == "reweighted, samples on axis 0 of its output"
    assert explained(torch.arange(5) + 5).startswith("plain in the latest batch: its 5 samples were not met")
    assert "reweighted" in (part := explained(torch.arange(5) + 3))
    assert "but for 3 of the 5 samples of the latest batch" in part
