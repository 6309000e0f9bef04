"""What is decided once for a layer's shapes is decided anew when they change."""

from __future__ import annotations

import torch
from torch import nn

import persample


def test_a_kernel_of_another_size_that_leads_to_the_same_output() -> None:
    model, c = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double(), torch.rand(4, dtype=torch.float64)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    with persample.reweight(model, lambda layer, grads: None, known=lambda layer, batch, device: c):
        for size in (3, 4, 3):
            model.weight = nn.Parameter(torch.randn(3, 2, size, size, dtype=torch.float64))
            out = model(x)
            assert out.shape == (4, 3, 4, 4)
            out.square().sum().backward()
            expected = model.weight.detach().clone().requires_grad_()
            (torch.conv2d(x, expected, None, 2, 1).square().sum((1, 2, 3)) * c).sum().backward()
            torch.testing.assert_close(model.weight.grad, expected.grad)
