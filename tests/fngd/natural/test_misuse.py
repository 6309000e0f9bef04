"""Wrong arguments of FNGD, and misuse in its loop, get a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coefficients import data, run
from preconditioned import Net
from torch import nn
from torch.nn import functional as F

from fngd import FNGD, NGD

PROBED = {"steps_per_epoch": 1, "refresh_cosine": 0.9}

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"steps_per_epoch=None.*give len\(loader\)"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0; it must be a whole number"),
        ({"steps_per_epoch": 1, "lr": -1.0}, "lr=-1.0"),
        ({"steps_per_epoch": 1, "momentum": -0.1}, "momentum=-0.1"),
        ({"steps_per_epoch": 1, "momentum": 0.0, "nesterov": True}, "nesterov=True needs momentum"),
        ({"steps_per_epoch": 1, "alpha": -1.0}, "alpha=-1.0; it must be > 0"),
        ({"steps_per_epoch": 1, "alpha": None}, "give exactly one"),
        ({"steps_per_epoch": 1, "scale": "x"}, "scale='x' is unknown"),
        ({"steps_per_epoch": 1, "reduction": "none"}, r"reduction='none' is unknown; choose one of \['mean', 'sum'\]"),
        ({"steps_per_epoch": 1, "share": "x"}, "share='x' is unknown"),
        ({"steps_per_epoch": 1, "control": "x"}, "control='x' is unknown"),
        ({"steps_per_epoch": 1, "refresh_epochs": 0}, "refresh_epochs=0"),
        ({"steps_per_epoch": 1, "share": "sample"}, r"needs samples=len\(dataset\)"),
        ({"steps_per_epoch": 1, "samples": 3}, "nothing else does"),
        ({"share": None, "control": "constant"}, "need share="),
        ({"steps_per_epoch": 1, "output_axis": -1}, "output_axis=-1; axes count from the front"),
        ({"steps_per_epoch": 1, "scaler": 3}, "scaler=int; it must be the GradScaler"),
        (PROBED | {"probe_layer": "hed"}, r"'hed' is no layer of the model. Its layers are \[.*'head'"),
        (PROBED | {"probe_layer": "frozen"}, "'frozen' takes the plain gradient"),
        (PROBED | {"probe_layer": "head", "gram": "network"}, "those of all layers together: leave it out"),
        ({"steps_per_epoch": 1, "params": []}, "no parameters to optimise"),
        (
            {"steps_per_epoch": 1, "params": [{"params": [torch.zeros(3, requires_grad=True)], "precondition": "no"}]},
            "precondition='no'; it must be True or False",
        ),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    model = Net()
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        FNGD(model, **options)
    assert not model.conv._forward_hooks, "a constructor that fails leaves the model alone"


def test_misuse_in_the_loop() -> None:
    model, batches = Net(), data(4, 4, 3)
    opt = FNGD(model, lr=0.0, steps_per_epoch=2)
    with pytest.raises(ValueError, match=r"reweighted already.*remove\(\)"):
        NGD(model)
    for batch in batches[:2]:
        run(model, opt, batch)
    with pytest.raises(
        ValueError, match=r"batch 1 of the epoch has 3 samples.*for 4\..*is steps_per_epoch=2 the length"
    ):
        run(model, opt, batches[2])
    with pytest.raises(ValueError, match="share='sample', but share is 'position'"):
        opt.next_batch(torch.arange(4))
    state = opt.state_dict()
    opt.remove()

    opt = FNGD(model, lr=0.0, steps_per_epoch=2)
    opt.start_epoch()
    for batch in batches[:2]:
        run(model, opt, batch)
    with pytest.raises(ValueError, match=r"batch 3 of an epoch, but steps_per_epoch is 2"):
        run(model, opt, batches[1])
    opt.remove()

    opt = FNGD(model, lr=0.0, steps_per_epoch=5)
    with pytest.raises(ValueError, match="steps_per_epoch=2, this optimiser 5"):
        opt.load_state_dict(state)
    with pytest.raises(ValueError, match="no 'coefficients'"):
        opt.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    opt.remove()

    opt = FNGD(model, lr=0.0, steps_per_epoch=5, share="sample", samples=9)
    with pytest.raises(ValueError, match=r"needs opt.next_batch\(sample_ids\)"):
        run(model, opt, batches[0])
    opt.next_batch(torch.arange(3))
    with pytest.raises(ValueError, match=r"3 sample ids, but layer 'head' has a batch of 4"):
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    with pytest.raises(ValueError, match="sample_ids must be integers"):
        opt.next_batch(torch.rand(3))
    opt.remove()
    opt = FNGD(model, lr=0.0, share=None)
    with pytest.raises(ValueError, match="share=None keeps no coefficients"):
        opt.start_epoch()
