"""Errors planted by hand in a backend's rules or rows are caught by the check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from capturing import X, needs_opacus, network, squares
from torch import Tensor, nn

import persample
from persample.backends import module_rules, vmap
from persample.blocks.types import Block, Outer
from persample.rules import RULES, Site


def test_a_wrong_rule_of_outputs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES["AddmmBackward0"]

    def wrong(site: Site) -> Block | None:
        block = right(site)
        return Outer(block.x, 1.001 * block.z) if isinstance(block, Outer) else block

    monkeypatch.setitem(RULES, "AddmmBackward0", wrong)
    with pytest.raises(persample.CheckError, match="do not add up"):
        persample.per_sample(network(), squares, X)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Conv1d])
def test_a_wrong_rule_of_hooks_is_caught(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
    right = module_rules.MODULE_RULES[kind]

    def wrong(call: module_rules.Call) -> dict[str, Block]:
        return right(module_rules.replace(call, z=1.001 * call.z))

    monkeypatch.setitem(module_rules.MODULE_RULES, kind, wrong)
    made = {
        nn.Linear: (network(), X),
        nn.LayerNorm: (nn.LayerNorm(4).double(), X),
        nn.Conv1d: (nn.Conv1d(2, 3, 2).double(), X.view(3, 2, 4)),
    }
    with pytest.raises(persample.CheckError, match=r"hooks.*do not add up"):
        persample.per_sample(made[kind][0], squares, made[kind][1], backend="hooks")


@pytest.mark.parametrize("spoil", [lambda g: 1.001 * g, lambda g: g.flip(0)], ids=["scaled", "rows exchanged"])
def test_wrong_rows_of_vmap_are_caught(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> None:
    """Exchanged rows add up, so the plain sum would not find them."""
    right = vmap.differentiate

    def wrong(*arguments: Any) -> Any:
        gradients, losses = right(*arguments)
        return {name: spoil(g) for name, g in gradients.items()}, losses

    monkeypatch.setattr(vmap, "differentiate", wrong)
    with pytest.raises(persample.CheckError, match="vmap"):
        persample.per_sample(network(), squares, X, backend="vmap")
    persample.per_sample(network(), squares, X, backend="vmap", check=False)  # at the caller's own risk


@needs_opacus
def test_wrong_rows_of_opacus_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    GradSampleModule = pytest.importorskip("opacus.grad_sample").GradSampleModule

    right = GradSampleModule.GRAD_SAMPLERS[nn.Linear]

    def wrong(*arguments: Any) -> Any:
        return {parameter: g.flip(0) for parameter, g in right(*arguments).items()}

    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, nn.Linear, wrong)
    with pytest.raises(persample.CheckError, match="opacus"):
        persample.per_sample(network(), squares, X, backend="opacus")
