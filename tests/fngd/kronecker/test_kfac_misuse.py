"""KFAC refuses nonsense and foreign states, and leaves no hooks where it does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fngd import EKFAC, KFAC, MBF, SKFAC, Eva


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping=0.0; it must be a number > 0"),
        ({"damping": math.nan}, "damping=nan"),
        ({"damping": math.inf}, "damping=inf makes every step 0"),
        ({"average": 1.0}, "average=1.0; it must be at least 0 and less than 1"),
        ({"statistics_every": 0}, "statistics_every=0; it must be a whole number"),
        ({"inverse_every": -1}, "inverse_every=-1"),
        ({"kl_clip": -1.0}, "kl_clip=-1"),
        ({"inverse": "svd"}, r"choose one of \['eigen', 'cholesky'\]"),
        ({"preset": "x"}, "choose one of"),
        ({"reduction": "none"}, r"choose one of \['mean', 'sum'\]"),
        ({"other": "lion"}, r"choose one of \['sgd', 'adamw'\]"),
        ({"other_options": {"lr": 1.0}}, "give other='adamw'"),
        ({"other": "adamw", "other_options": {"beta": 1.0}}, "AdamW takes"),
        ({"lr": -1.0}, "lr=-1.0; it must be at least 0"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=True needs momentum"),
        ({"scaler": 3}, "it must be the GradScaler"),
    ],
)
def test_nonsense_is_refused_and_leaves_no_hooks(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        KFAC(model, **options)
    KFAC(model).remove()


def test_foreign_states_are_refused() -> None:
    model = nn.Linear(3, 2)
    opt = KFAC(model)
    with pytest.raises(ValueError, match="Load what its own state_dict"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    other = nn.Sequential(nn.Linear(3, 2))
    trained = KFAC(other)
    other(torch.randn(2, 3)).mean().backward()
    trained.step()
    with pytest.raises(ValueError, match="this model's layers are"):
        opt.load_state_dict(trained.state_dict())


@pytest.mark.parametrize("build", [KFAC, EKFAC, MBF, SKFAC, Eva])
def test_a_loss_that_is_reduced_in_another_way(build: Any) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    opt = build(model)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"the training loss is a sum .* reduction='mean'\. Give it reduction='sum'"):
        opt.step(closure)
    with pytest.raises(ValueError, match="the training loss is a sum"):
        opt.check_loss(model(x).square().sum())
    opt.check_loss(model(x).square().mean())
    assert torch.equal(model.weight, before)
